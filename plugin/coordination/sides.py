"""Sides that rest, and sides that cannot learn: what a training loop does about the one and says about the other."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from equipoise.coordination.balance import LANGUAGE, Balance

PATIENCE = 5  # measurements without a ratio, one after the other, before it is said


@contextlib.contextmanager
def resting(components: Mapping[str, Sequence[Tensor]], factors: Mapping[str, float]) -> Iterator[None]:
    """Freezes the components whose rate is multiplied by 0 for the block: their gradients are not computed, count
    nothing in a clipped norm and leave an optimizer's moments alone."""
    still = [t for name, some in components.items() if factors[name] == 0 for t in some if t.requires_grad]
    for tensor in still:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in still:
            tensor.requires_grad_(True)


class Watch:
    """Notices that κ is undefined measurement after measurement, and says once why that may be."""

    def __init__(self) -> None:
        self.missing = 0  # measurements without a finite κ, one after the other
        self.told = False

    def observe(self, balance: Balance, gradients: Mapping[str, float]) -> str | None:
        """What to say of a side that cannot learn, once.

        Args:
            balance: A measurement after a step in which no component rested.
            gradients: The norm of each component's gradient in that step, or ‖G‖/‖θ‖.
        """
        self.missing = 0 if balance.kappa == balance.kappa else self.missing + 1
        if self.told or self.missing < PATIENCE:
            return None
        self.told = True
        return f"coordinator: κ has had no finite value in {self.missing} measurements: {_reason(balance, gradients)}"


def _reason(balance: Balance, gradients: Mapping[str, float]) -> str:
    without = [name for name, norm in gradients.items() if not norm]
    if without:
        names = " and ".join(without)
        return (
            f"{names} gets no gradient, so that there is nothing to balance, and the rates stay as the schedule has "
            "them. The answers may not depend on it, or its way to the language model may be cut or frozen. Name "
            "parts that the answers depend on (encoder.parts or components), or set the coordinator to constant."
        )
    if not (balance.language < float("inf") and balance.encoder < float("inf")):
        return "the predictions are not finite. Use a smaller learning rate."
    still = [LANGUAGE] * (not balance.language) + ["encoder"] * (not balance.encoder)
    return (
        f"the steps of {' and of '.join(still)} do not move the predictions, though there is a gradient. At these "
        "rates that may be rounding. Use a larger learning rate or float32, or set the coordinator to constant."
    )
