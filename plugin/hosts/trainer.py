"""What the programs built on transformers' Trainer share: another optimizer class in place of the Trainer's own."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback

from equipoise.errors import InputError
from equipoise.hosts.script import Choice
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
        check_base(choice, cls)
        made = (scaled if choice.method == "scaled" else bounded)(cls)
        say(f"{choice.method} ({_words(choice.options)}) on {cls.__name__}.")
        return made, {**kwargs, **choice.options}
    known = inspect.signature(choice.cls).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    kept = {key: value for key, value in kwargs.items() if takes_all or key in known}
    say(f"{choice.name} takes {cls.__name__}'s place ({_words(choice.options)}).")
    if lost := [f"{key}={value!r}" for key, value in kwargs.items() if key not in kept]:
        say(f"warning: {choice.name} does not have {', '.join(lost)}, which the program sets.")
    return choice.cls, {**kept, **choice.options}


def check_base(choice: Choice, cls: type[Optimizer]) -> None:
    """Raise an InputError if the user named another base than `cls`, as in scaled_adamw on SGD."""
    base = choice.base
    if base is not None and not (issubclass(cls, base) or base.__name__.lower() in cls.__name__.lower()):
        raise InputError(
            f"{choice.name}: the program makes a {cls.__name__}, not an {base.__name__}. Use {choice.method}, which "
            f"treats any optimizer, or the program's own option for {base.__name__}."
        )


class SayPairs(TrainerCallback):
    """Says on stderr, when training starts, which LoRA pairs the optimizer treats."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if hasattr(optimizer, "pairs"):
            say(optimizer.pairs.summary)


def say(text: str) -> None:
    print(f"equipoise: {text}", file=sys.stderr, flush=True)


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items()) or "options at their defaults"
