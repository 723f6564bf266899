"""LFM: makes modalities predict alike at first, and lets the labels weigh more as training goes on.

Method: LFM, dynamically learning the modality gap.
Paper: Yang, Wan, Jiang & Xu, Facilitating Multimodal Classification via Dynamically Learning Modality Gap, NeurIPS
2024, and the code that its authors released.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.balancing.counted import Counted
from equipoise.balancing.objective import Backward, Losses, differentiate, wide

# The weight of the labels by epochs: the authors' polynomial through what they learned on CREMA-D, from 0 to EPOCHS
_FITTED = (2.04623704e-01, 3.35472727e-03, 1.22989557e-04, -2.92947416e-06, 2.23835486e-08, -5.39717505e-11)
EPOCHS = 200


class LFM(Counted):
    """Trains on the joint loss and on the agreement of the modalities' predictions (LFM), for two or more modalities.

    Minimizes 2·(w·f_mm + (1 − w)·a), where a is the mean over pairs of modalities of (KL(m‖p) + KL(m‖q))/2, p and q
    being the softmax of their parts of the joint head, and m = (p + q)/2. w is the polynomial that the authors fitted
    to the weights that they had learned in 200 epochs of CREMA-D: 0.20 at the start, 0.54 in the middle, 0.99 after
    175 epochs and 0.90 at the end.

    As in the authors' code, in which this agreement stands where the paper speaks of contrastive learning; but their
    joint logits are the mean of the parts, and here what `model.fusion` makes of them, and theirs is for two
    modalities. Weights that are learned on the way are not here: their code takes the mean of a Hessian-vector product
    over the model's first tensor alone in place of the derivative.

    Args:
        epochs_all: Epochs that stand for the authors' 200; w stays where it is at their end. (> 0)

    Raises:
        InputError: The training loop has no epochs.

    References:
        Yang et al., Facilitating Multimodal Classification via Dynamically Learning Modality Gap, NeurIPS 2024.
    """

    uses_unimodal: ClassVar[bool] = False
    needs_head = "parts"
    takes_missing: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (2, math.inf)

    def __init__(self, epochs_all: float = 200.0) -> None:
        self.epochs_all = epochs_all

    def weight(self) -> float:
        """w, of the labels, in the epoch that is under way."""
        epoch = min(EPOCHS, int(self.epochs(self._steps)) * EPOCHS / self.epochs_all)
        return sum(factor * epoch**power for power, factor in enumerate(_FITTED))

    def combine(self, losses: Losses) -> Tensor:
        _, responses, _ = self.asked(losses)
        pairs = [_apart(*pair) for pair in combinations(responses.values(), 2)]
        weight = self.weight()
        return 2 * (weight * losses.joint + (1 - weight) * torch.stack(pairs).mean())

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        return super().backward(losses, backward) | {"weight_labels": self.weight()}


def _apart(*pair: Tensor) -> Tensor:
    """(KL(m‖p) + KL(m‖q))/2 of two predictions' softmax and its mean m, averaged over the batch."""
    logs: Sequence[Tensor] = [wide(logits).log_softmax(1) for logits in pair]
    middle = torch.logsumexp(torch.stack(logs), 0) - math.log(2)
    return (middle.exp() * (middle - torch.stack(logs).mean(0))).sum(1).mean()
