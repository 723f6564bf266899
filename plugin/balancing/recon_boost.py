"""ReconBoost: modalities take turns; each is boosted on what the others get wrong, then all are trained together.

Method: ReconBoost.
Paper: Hua, Xu, Bao, Yang & Huang, ReconBoost: Boosting Can Achieve Modality Reconcilement, ICML 2024, and the code that
its authors released. Options: `fit` and `differ` are their weight1 and weight2, `epochs_each` epochs_per_stage,
`epochs_all` correct_epoch.
"""

import math
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from equipoise.balancing.counted import Counted
from equipoise.balancing.objective import Losses, wide


class ReconBoost(Counted):
    """Trains one modality after the other, each on what the others get wrong (ReconBoost), for any number of them.

    The joint logits are the sum of a part of each modality. In a stage modality k alone is trained, encoder and part,
    for `epochs_each` epochs on the mean over the batch of (−fit·log p_k(y) + differ·p(y)·log p_k(y))/classes, where p_k
    is the softmax of its part, and p that of the sum of the others' as they stand: the better they know a clip already,
    the less it counts. Then everything is trained on the joint loss for `epochs_all` epochs, and the next modality's
    stage begins.

    In the authors' code all modalities have one head of two layers, the sum is multiplied by a number that is learned,
    each stage has an optimizer of its own, a modality joins the sum at the end of its first stage, and encoders are
    trained alone before. Its agreement term has no gradient there and is not here. Classes weigh alike within a stage.

    Args:
        fit: Weight of the modality's own loss. (> 0)
        differ: Weight of what the others know. (>= 0)
        epochs_each: Epochs of one modality in a stage. (> 0)
        epochs_all: Epochs of all together at a stage's end. (>= 0)

    Raises:
        InputError: The training loop has no epochs.

    References:
        Hua et al., ReconBoost: Boosting Can Achieve Modality Reconcilement, ICML 2024.
    """

    uses_unimodal: ClassVar[bool] = False
    needs_head = "sum"  # a part that rests must have no gradient: one of zeros still lets momentum and decay move it
    takes_missing: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (2, math.inf)

    def __init__(
        self, fit: float = 5.0, differ: float = 1.0, epochs_each: float = 4.0, epochs_all: float = 4.0
    ) -> None:
        self.fit, self.differ = fit, differ
        self.epochs_each, self.epochs_all = epochs_each, epochs_all

    def turn(self) -> str | None:
        """The modality that is trained in this step; none: all of them."""
        stage, within = divmod(self.epochs(self._steps), self.epochs_each + self.epochs_all)
        return list(self.encoders)[int(stage) % len(self.encoders)] if within < self.epochs_each else None

    def combine(self, losses: Losses) -> Tensor:
        labels, responses, _ = self.asked(losses)
        name, true = self.turn(), labels[:, None]
        if name is None:
            return losses.joint
        others = sum(wide(said.detach()) for other, said in responses.items() if other != name)
        assert isinstance(others, Tensor)
        known = F.softmax(others, 1).gather(1, true)
        own = F.log_softmax(wide(responses[name]), 1).gather(1, true)
        return ((self.differ * known - self.fit) * own).mean() / others.shape[1]
