"""Equal weighting (EW): the joint loss plus every modality's own, a multi-task baseline of the balancing methods.

Source: the baseline EW of Fernando et al., "Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective
Optimization", Tables 1 to 3.
"""

from typing import ClassVar

from torch import Tensor

from equipoise.balancing.objective import Losses, Objective
from equipoise.errors import InputError


class EqualWeight(Objective):
    """Trains on the sum of the joint loss and every unimodal loss (EW).

    Minimizes f_mm + Σ_k f_mk. Every modality is trained whatever the others do, but nothing gives preference to the one
    that lags behind.

    References:
        Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization,
        Tables 1 to 3, row EW.
    """

    modalities: ClassVar[tuple[int, float]] = (1, float("inf"))

    def combine(self, losses: Losses) -> Tensor:
        """The sum to differentiate.

        Raises:
            InputError: When there are no unimodal losses, so that this would be the joint loss under another name.
        """
        if not losses.unimodal:
            raise InputError("equal_weight needs a loss per modality, and this model gives none. Use `joint`.")
        return losses.joint + sum(losses.unimodal.values())
