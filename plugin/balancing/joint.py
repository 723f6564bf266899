"""The joint loss alone: multimodal models as usually trained (MML), and the baseline of every balancing method.

Source: Fernando et al., "Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization",
eq. 3.
"""

from typing import ClassVar

from torch import Tensor

from equipoise.balancing.objective import Losses, Objective


class Joint(Objective):
    """Trains on the joint loss alone (MML).

    Minimizes f_mm. Where one modality is learned faster than the others it soon lowers the joint loss by itself and the
    others stop improving; the balancing objectives are measured against that. For a model with one modality this is
    ordinary training.

    References:
        Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization, eq. 3.
    """

    uses_unimodal: ClassVar[bool] = False

    def combine(self, losses: Losses) -> Tensor:
        return losses.joint
