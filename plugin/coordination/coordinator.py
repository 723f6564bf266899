"""What a coordinator is: it sets the learning rates of a model's components against one another while training."""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from equipoise.coordination.balance import LANGUAGE, Balance, Metric
from equipoise.errors import InputError

Ascended = Literal["squared", "distance"]


class Coordinator:
    """Base of every coordinator: one factor per component on the learning rate that the schedule gives it.

    A component is a named part of the model with its own parameter groups, such as `encoder` and `language`. Factors
    multiply the scheduled rate and never overwrite it; a component whose factor is 0 rests, and gets no gradient. A
    training loop asks before each step for the `factors`, and
    whether it is to measure the balance after it (`measures`); what it measured it hands to `observe`, and after
    every step the parameters to `stepped`.

    Options are the keyword arguments of the subclass's `__init__`. Coordinators are found by name in the entry-point
    group `equipoise.coordinators`.
    """

    metric: Metric = "jensen_shannon"
    two_sided = False  # whether it needs a component `language` and another one
    each = False  # whether the balance is also measured of each component of the encoder side alone
    ascends: Ascended = "squared"  # what a look-ahead regulariser ascends
    within = False  # whether its gradient is taken within the step, after one on trial

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        """The factor of each component for the next step; 1.0 leaves the scheduled rate as it is."""
        raise NotImplementedError(f"{type(self).__name__} does not define factors()")

    def measures(self, step: int) -> bool:
        """Whether the balance is to be measured with what the step numbered `step`, from 0, changes."""
        return False

    def weight(self, step: int) -> float:
        """The weight of the look-ahead regulariser (eq. 7 and 8) after that step; 0 where there is none."""
        return 0.0

    def observe(self, step: int, balance: Balance) -> dict[str, float]:
        """Takes a measurement; returns numbers worth logging."""
        return {}

    def stepped(self, components: Mapping[str, Sequence[Tensor]], step: int, steps: int) -> None:
        """Called after each step with the components' parameters and the length of the run."""

    def state_dict(self) -> dict:
        """What a resumed run needs, in numbers, strings and tensors; empty for a coordinator without memory."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Takes back what `state_dict` gave."""


def split(components: Sequence[str], language: float, encoder: float) -> dict[str, float]:
    """Factors by side.

    Raises:
        InputError: the model has not both sides.
    """
    if LANGUAGE not in components or len(set(components)) < 2:
        raise InputError(
            f"coordinator.name: this coordinator sets a component {LANGUAGE!r} against an encoder side, and this model "
            f"has {', '.join(components) or 'no components'}. Use `constant`, or a pipeline with both sides."
        )
    return {name: language if name == LANGUAGE else encoder for name in components}


class Measured(Coordinator):
    """A coordinator that can be asked to measure the balance, for a log, without acting on it."""

    def __init__(self, measure_every: int = 0, metric: Metric = "jensen_shannon"):
        """
        Args:
            measure_every: Steps between measurements of κ, each two or three forward passes; 0 measures none (>= 0).
            metric: What the distance between two predictions is.
        """
        self.measure_every, self.metric = measure_every, metric

    def measures(self, step: int) -> bool:
        return bool(self.measure_every) and step % self.measure_every == 0

    def observe(self, step: int, balance: Balance) -> dict[str, float]:
        return {
            "kappa": balance.kappa,
            "moved_language": balance.language,
            "moved_encoder": balance.encoder,
            "h_language": balance.h_language,
            "h_encoder": balance.h_encoder,
            **{f"kappa_{name}": value for name, value in balance.kappas.items()},
            **{f"moved_{name}": value for name, value in balance.each.items() if name != "encoder"},
        }
