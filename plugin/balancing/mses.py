"""MSES: stops training a modality's encoder when its own validation loss has stopped falling.

Method: modality-specific early stopping.
Paper: Fujimori, Endo, Kawai & Mochizuki, Modality-Specific Learning Rate Control for Multimodal Classification, 2020.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from equipoise.balancing.objective import Losses, Objective


class MSES(Objective):
    """Trains on the joint loss and stops each encoder when its modality's validation loss rises (MSES).

    The rate of a stopped encoder is 0 from then on; the others and the heads go on. Needs validation while training.

    Args:
        patience: Validations in a row without a new best loss before an encoder is stopped. (>= 1)

    References:
        Fujimori et al., Modality-Specific Learning Rate Control for Multimodal Classification, ACPR 2019.
    """

    uses_unimodal: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (1, math.inf)

    def __init__(self, patience: int = 1) -> None:
        self.patience = patience
        self.best: dict[str, float] = {}
        self.waited: dict[str, int] = {}

    @property
    def stopped(self) -> list[str]:
        return [name for name, count in self.waited.items() if count >= self.patience]

    def combine(self, losses: Losses) -> Tensor:
        return losses.joint

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        return dict.fromkeys(self.stopped, 0.0)

    def after_validation(self, losses: Mapping[str, float]) -> str:
        before = self.stopped
        for name, loss in losses.items():
            better = loss < self.best.get(name, math.inf)
            self.best[name] = loss if better else self.best.get(name, loss)
            if name not in before:
                self.waited[name] = 0 if better else self.waited.get(name, 0) + 1
        new = [name for name in self.stopped if name not in before]
        return f"stopped the encoder of {' and '.join(new)}: its validation loss rises." if new else ""

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = dict(state["best"]), dict(state["waited"])
