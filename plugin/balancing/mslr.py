"""MSLR: each modality's encoder has a learning rate of its own.

Method: modality-specific learning rates.
Paper: Yao & Mihalcea, Modality-specific Learning Rates for Effective Multimodal Additive Late-fusion, Findings of ACL
2022.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from equipoise.balancing.objective import Losses, Objective
from equipoise.errors import InputError


class MSLR(Objective):
    """Trains on the joint loss with a factor on each encoder's learning rate (MSLR).

    Choose the factors so that each encoder gets the rate at which it learns best by itself. A schedule goes on top.

    Args:
        factors: Modality → factor on its encoder's learning rate, as {audio: 0.3, visual: 3}; modalities that are not
            named keep theirs. (each >= 0)

    Raises:
        InputError: factors is no such mapping, or names no modality.

    References:
        Yao & Mihalcea, Modality-specific Learning Rates for Effective Multimodal Additive Late-fusion, 2022, "keep".
    """

    uses_unimodal: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (1, math.inf)

    def __init__(self, factors: dict[str, float]) -> None:
        good = isinstance(factors, dict) and all(
            isinstance(value, int | float) and 0 <= value < math.inf for value in factors.values()
        )
        if not good or not factors:
            raise InputError(f"factors: must be modalities with numbers >= 0, as {{audio: 0.3}}, got {factors!r}.")
        self._factors = factors

    def bind(self, encoders) -> None:
        super().bind(encoders)
        if unknown := [name for name in self._factors if name not in encoders]:
            raise InputError(f"factors: {', '.join(unknown)} is no modality here; there are {', '.join(encoders)}.")

    def combine(self, losses: Losses) -> Tensor:
        return losses.joint

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        return self._factors
