"""What the programs built on transformers' Trainer share: another optimizer class in place of the Trainer's own."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback

from equipoise.errors import InputError
from equipoise.hosts.choice import Choice, doubt_rate, report
from equipoise.optimizers.bounded import bounded
from equipoise.optimizers.scaled import scaled


def put_in_place(choice: Choice, cls: Any, kwargs: Mapping[str, Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    """Trainer's `optimizer_cls_and_kwargs` for `choice`, made from those that the Trainer would have used.

    Raises:
        InputError: `cls` is no optimizer class, or not of the kind that was named.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)) or "optimizer_dict" in kwargs:
        raise InputError(
            f"{choice.name} cannot treat {getattr(cls, '__name__', cls)}, which makes several optimizers. Choose a "
            "plain one, such as adamw_torch, as the program's own."
        )
    if choice.method is not None:
        choice.check_base(cls)
        made = (scaled if choice.method == "scaled" else bounded)(cls)
        report(f"{choice.method} ({choice.words}) on {cls.__name__}.")
        return made, {**kwargs, **choice.options}
    return choice.cls, choice.take_place(cls.__name__, kwargs)


class SayPairs(TrainerCallback):
    """Reports on stderr, when training starts, which LoRA pairs the optimizer treats."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if hasattr(optimizer, "pairs"):
            report(optimizer.pairs.summary)
            doubt_rate(optimizer)
