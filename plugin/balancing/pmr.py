"""PMR: draws the slower modality's features towards its classes' prototypes.

Method: prototypical modal rebalance.
Paper: Fan, Xu, Wang, Wang & Guo, PMR: Prototypical Modal Rebalance for Multimodal Learning, CVPR 2023, and the code
that its authors released. Options: `alpha`, `momentum` and `ends` are their alpha, momentum_coef and modulation_ends.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.balancing.counted import Counted
from equipoise.balancing.objective import Backward, Losses, differentiate, wide
from equipoise.errors import InputError


class PMR(Counted):
    """Trains on the joint loss, and the slower modality on its prototypes too (PMR); for two modalities.

    A class's prototype is the mean of its training clips' features in one modality. By the softmax of the negative
    distances to all prototypes a modality predicts the class without a head; s_k is the sum over the batch of what it
    gives the true one. The modality with the lesser s_k gets α times the cross-entropy of that prediction on top, in
    which classes weigh as in the joint loss; in s_k they weigh alike. The prototypes are made anew for each epoch, from
    the third time on as (1 − m)·new + m·old.

    As in the authors' code, which has no entropy term against early convergence beside it, as the paper has. Theirs
    makes prototypes of a tenth of the batches, this of all training clips, or of 10,000 drawn by chance.

    Args:
        alpha: Weight of the slower modality's prototype loss, α. (>= 0)
        momentum: The old prototypes' share in the new ones, m. (0 <= x < 1)
        ends: The last epoch, counted from 0, in which it weighs; none: to the end. The authors have 100 of 150. (>= 0)

    Raises:
        InputError: The training loop has no epochs, or gives no features.

    References:
        Fan et al., PMR: Prototypical Modal Rebalance for Multimodal Learning, CVPR 2023.
    """

    uses_unimodal: ClassVar[bool] = False
    uses_features: ClassVar[bool] = True
    takes_missing: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (2, 2)

    def __init__(self, alpha: float = 1.0, momentum: float = 0.2, ends: int | None = None) -> None:
        self.alpha, self.momentum, self.ends = alpha, momentum, ends
        self.prototypes: dict[str, Tensor] = {}  # modality → (classes, width); NaN where a class has none yet
        self._made = 0

    def wants_features(self) -> bool:
        return self._made <= int(self.epochs(self._steps))

    @torch.no_grad()
    def take_features(self, train, train_labels, validation, validation_labels) -> str:
        """Makes the prototypes of the epoch that begins."""
        classes = 1 + int(max(train_labels.max(), validation_labels.max()))
        counts = torch.bincount(train_labels, minlength=classes)[:, None]
        old, self.prototypes = self.prototypes, {}
        for name, features in train.items():
            sums = features.new_zeros(classes, features.shape[1]).index_add_(0, train_labels, features)
            new = sums / counts  # NaN for a class that is not there
            if name in old:
                kept = old[name].to(new.device)
                mixed = (1 - self.momentum) * new + self.momentum * kept if self._made > 1 else new
                new = torch.where(counts > 0, torch.where(kept.isnan(), new, mixed), kept)
            self.prototypes[name] = new
        self._made = int(self.epochs(self._steps)) + 1
        return ""

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        own, scores = self._predicted(losses)
        weights = self._weights(scores)
        total = losses.joint + sum(weights[name] * own[name] for name in own)
        backward(total)
        logged = {f"prototype_weight_{name}": weight for name, weight in weights.items()}
        return {"loss": total.detach(), **logged}

    def _predicted(self, losses: Losses) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each modality's loss by its prototypes, and the sum of what it gives the true classes."""
        true, _, given = self.asked(losses)
        if not self.prototypes:
            raise InputError("PMR needs the training clips' features once an epoch, which this training does not give.")
        own, scores = {}, {}
        for name, features in given.items():
            prototypes = self.prototypes[name].to(features.device)
            known = ~prototypes.isnan().any(1)
            here = wide(features), prototypes.nan_to_num().to(wide(features).dtype)
            near = -torch.cdist(*here, compute_mode="donot_use_mm_for_euclid_dist")
            # a class of which none of the clips that made them had any is beyond the last prototype
            there = known[true.clamp(max=len(known) - 1)] & (true < len(known))
            near, labels = near.masked_fill(~known, -math.inf)[there], true[there]
            weights = None if losses.weights is None else losses.weights[there]
            theirs = losses._replace(labels=labels, weights=weights)
            own[name] = theirs.of(near) if len(labels) else features.sum() * 0
            scores[name] = near.detach().softmax(1).gather(1, labels[:, None]).sum()
        return own, scores

    def _weights(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        (one, first), (other, second) = scores.items()
        weighs = self.alpha if self.ends is None or int(self.epochs(self._steps)) <= self.ends else 0.0
        return {one: weighs * (first < second).to(first.dtype), other: weighs * (second < first).to(first.dtype)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"prototypes": dict(self.prototypes), "made": self._made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.prototypes, self._made = dict(state["prototypes"]), state["made"]
