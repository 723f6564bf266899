"""What an optimizer may have beyond torch's `Optimizer`; a training loop uses what there is."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch.optim import Optimizer


@runtime_checkable
class Measuring(Protocol):
    """An optimizer that measures something of its steps."""

    def metrics(self) -> Mapping[str, float]:
        """What it measured in its last step, by the names that a log has it under."""
        ...


@runtime_checkable
class Perturbing(Protocol):
    """An optimizer that has each batch evaluated twice, the second time at other weights."""

    def perturb(self) -> bool:
        """Moves the weights, by the gradients that are there; whether a second evaluation is due."""
        ...

    def restore(self) -> None:
        """Moves the weights back, after the second evaluation and before the step."""
        ...


def metrics(optimizer: Optimizer) -> dict[str, float]:
    """What an optimizer measured in its last step; nothing where it has no `metrics`."""
    return dict(optimizer.metrics()) if isinstance(optimizer, Measuring) else {}
