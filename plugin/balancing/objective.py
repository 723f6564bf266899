"""What an objective is: it turns one batch's joint and unimodal losses into gradients."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.errors import InputError
from equipoise.options import read_options


class Losses(NamedTuple):
    """One batch's losses, each a scalar tensor with its graph, and what some objectives weigh them by."""

    joint: Tensor  # the loss of the prediction from all modalities
    unimodal: Mapping[str, Tensor]  # modality → the loss of the prediction from that modality alone; may be empty
    labels: Tensor | None = None  # (batch,) class of each example
    responses: Mapping[str, Tensor] | None = None  # modality → (batch, classes): see Objective.uses_responses
    features: Mapping[str, Tensor] | None = None  # modality → (batch, width): see Objective.uses_features
    weights: Tensor | None = None  # (batch,) of the examples, where classes weigh differently

    def of(
        self,
        logits: Tensor,  # (batch, classes)
    ) -> Tensor:
        """The loss of another prediction of these examples, as that of the joint one is made."""
        assert self.labels is not None
        each = F.cross_entropy(wide(logits), self.labels, reduction="none")
        return each.mean() if self.weights is None else (each * self.weights).sum() / self.weights.sum()


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


class Reached(NamedTuple):
    """What a loss came to in a training for itself alone."""

    train_first: float  # before it
    validation_first: float
    train_last: float  # after it
    validation_last: float
    validation_best: float
    noise: float = 0.0  # the standard error of `validation_last`, over the validation examples; infinite of one alone
    examples: int = 1  # how many those were


class Backward(Protocol):
    """What differentiates a scalar: `Tensor.backward`, or a training loop's own around `accelerator.backward`."""

    def __call__(self, total: Tensor, /, *, retain_graph: bool = False) -> object: ...


def differentiate(total: Tensor, /, *, retain_graph: bool = False) -> None:
    total.backward(retain_graph=retain_graph)


class Objective:
    """Base of every objective. Override `combine`, or `backward` where gradients are made in another way.

    A training loop calls `bind` once; then, in each step, `backward` once per forward pass and `before_step` when the
    step's gradients are complete, and multiplies the learning rates by `factors`; and `after_validation` whenever it
    has validated. All but `combine` may be left as they are.

    Options are the keyword arguments of the subclass's `__init__`, which is given none that its annotations and
    docstring forbid: a constructor refuses what the command line does, in the same sentences. Objectives are found by
    name in the entry-point group `equipoise.objectives`.
    """

    # Whether unimodal losses reach the encoders. Where not, their heads learn beside, from features without a gradient.
    uses_unimodal: ClassVar[bool] = True
    # Whether `Losses.responses` is wanted: logits from each modality alone, without a gradient; its part of the joint
    # head's where those are a sum of parts, else its own head's.
    uses_responses: ClassVar[bool] = False
    # What the joint head must be. "parts": its logits are a sum of one part of each modality; "sum": and each part has
    # parameters of its own; "shared": one head that every modality's features go through. `Losses.responses` then carry
    # a gradient, and `joint_head` is set.
    needs_head: ClassVar[Literal["any", "parts", "sum", "shared"]] = "any"
    uses_features: ClassVar[bool] = (
        False  # whether `Losses.features` is wanted: those of the encoders, with their graph
    )
    changes_features: ClassVar[bool] = False  # whether `fuse` is to be called
    # Whether an example may lack a modality, and if not, what the objective does that needs all.
    takes_missing: ClassVar[bool] = True
    needs_all: ClassVar[str] = "compares what modalities say of the same clip"
    trains_joint: ClassVar[bool] = True  # whether the joint prediction is worth looking at
    modalities: ClassVar[tuple[int, float]] = (0, float("inf"))  # how many it takes: at least, at most

    encoders: Mapping[str, Sequence[Tensor]] = {}  # modality → its encoder's trainable parameters; set by `bind`
    joint_head: Sequence[Tensor] = ()  # its trainable parameters; set by a training loop that has one
    steps_per_epoch: float = 0.0  # set by a training loop that has epochs, before its first step
    # Whether `take_alone` is to be called before the first step of a training, where there is a loop that can; and
    # whether it needs the joint loss's too, and trainings of the same length.
    needs_alone: bool = False
    alone_joint: ClassVar[bool] = False
    alone_option: ClassVar[str] = ""  # the option that takes numbers in place of those trainings

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _checked(cls, cls.__init__)

    def bind(self, encoders: Mapping[str, Sequence[Tensor]]) -> None:
        """Takes the parameters that each modality has to itself.

        Raises:
            InputError: The objective is not made for this many modalities, or for these.
        """
        least, most = self.modalities
        if least and not encoders:
            raise InputError(
                f"{type(self).__name__} needs a loss of each modality, and here a step has one loss in all. Use the "
                "objective `joint`."
            )
        if not least <= len(encoders) <= most:
            wanted = (
                f"{least:g}" if least == most else f"at least {least:g}" if most == float("inf") else f"1 to {most:g}"
            )
            raise InputError(
                f"{type(self).__name__} takes {wanted} modalities with losses of their own, and there are "
                f"{len(encoders)} ({', '.join(encoders)}). Use another objective, such as `joint`."
            )
        self.encoders = dict(encoders)

    def epochs(self, steps: int) -> float:
        """How many epochs so many steps are.

        Raises:
            InputError: The training loop has no epochs.
        """
        if not self.steps_per_epoch:
            raise InputError(f"{type(self).__name__} counts epochs, and this training has none.")
        return steps / self.steps_per_epoch

    def asked(self, losses: Losses) -> tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """A batch's labels, and its responses and features where the objective asks for them; else none of these.

        Raises:
            InputError: The training loop does not give what the objective asks for.
        """
        responses = self.uses_responses or self.needs_head != "any"
        wanted = {
            "the examples' classes": (losses.labels, True),
            "what each modality alone predicts": (losses.responses, responses),
            "the encoders' features": (losses.features, self.uses_features),
        }
        if missing := [what for what, (given, asks) in wanted.items() if asks and given is None]:
            name = type(self).__name__
            raise InputError(f"{name} needs {' and '.join(missing)}, which this training does not give.")
        assert losses.labels is not None
        return losses.labels, losses.responses or {}, losses.features or {}

    def combine(self, losses: Losses) -> Tensor:
        """The scalar to differentiate."""
        raise NotImplementedError(f"{type(self).__name__} defines neither combine() nor backward()")

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        """Adds the objective's gradient to the parameters' `.grad`.

        What it remembers of a batch goes into attributes of its own that are replaced, not changed in place: the second
        evaluation of a sharpness-aware optimizer is made with a shallow copy, and counts for nothing else.

        Args:
            losses: This batch's losses.
            backward: What differentiates a scalar; a training loop passes its own.

        Returns:
            Numbers worth logging, by name. Tensors are detached scalars, left on their device so as not to wait for it.
        """
        total = self.combine(losses)
        backward(total)
        return {"loss": total.detach()}

    def before_step(self) -> dict[str, float | Tensor]:
        """Changes the complete gradients of a step, before they are clipped; returns numbers worth logging."""
        return {}

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        """Factors on the learning rates of some components, modalities among them; 1 where none is given."""
        return {}

    def take_alone(self, reached: Mapping[str, Reached]) -> str:
        """Takes what each modality reaches when it is trained by itself, if `needs_alone`; and the joint loss, by the
        name of joint, if `alone_joint`; returns a sentence for the log if something follows from it."""
        return ""

    def fuse(
        self,
        features: Mapping[str, Tensor],  # modality → (batch, width), with their graph
        responses: Mapping[str, Tensor],  # as `Losses.responses`; of several processes, all of them
        labels: Tensor,  # the classes of those
    ) -> Mapping[str, Tensor]:
        """What the joint head is given in place of the features, if `changes_features`."""
        return features

    def wants_features(self) -> bool:
        """Whether `take_features` is to be called before the next step."""
        return False

    def take_features(
        self,
        train: Mapping[str, Tensor],  # modality → (examples, width)
        train_labels: Tensor,
        validation: Mapping[str, Tensor],
        validation_labels: Tensor,
    ) -> str:
        """Takes the encoders' features of the training and the validation examples; returns a sentence for the log."""
        return ""

    def after_validation(self, losses: Mapping[str, float]) -> str:
        """Takes each modality's validation loss; returns a sentence for the log if something follows from it."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in numbers, strings and tensors; empty for an objective without memory."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


def _checked(cls: type, make: Callable[..., None]) -> Callable[..., None]:
    """A class's `__init__`, given its options as the command line would read them.

    Raises:
        InputError: An option is not what it must be.
    """

    @functools.wraps(make)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = inspect.signature(make).bind(self, *args, **kwargs)
        except TypeError:  # Python's own words, on arguments that are missing or unknown
            return make(self, *args, **kwargs)
        named = {name: value for name, value in list(given.arguments.items())[1:] if name not in ("args", "kwargs")}
        values, problems = read_options(cls, named)
        if problems:
            make(self, *args, **kwargs)  # which may say it in words of its own
            raise InputError("\n".join(problems))
        given.arguments.update(values)
        return make(*given.args, **given.kwargs)

    return checked
