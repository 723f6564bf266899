"""OPM: drops the dominant modality's features with a probability that grows with how far it is ahead.

Method: on-the-fly prediction modulation.
Paper: Wei, Hu, Du & Wen, On-the-fly Modulation for Balanced Multimodal Learning, IEEE TPAMI 2024, and the code that its
authors released. Options: `base` is q_base, `lam` the λ of the probability, `execute` p_exe, `starts` the first epoch
after their warm-up.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.balancing.counted import Counted
from equipoise.balancing.objective import Losses
from equipoise.errors import InputError


class OPM(Counted):
    """Trains on the joint loss of features from which the dominant modality's are dropped (OPM); for two modalities.

    With s_k the sum over the batch of the softmax score that modality k alone gives to the true class through the joint
    head, ρ_k = s_k/s_other: where ρ_k > 1, each example's features of k are set to zero with the probability
    q_k = min(base·(1 + λ·tanh(ρ_k − 1)), 1), and all features are divided by 1 − θ, where θ is the mean of q weighted
    by the widths of the features, as dropout does. That is done in a share `execute` of the batches. Where the joint
    logits are no sum of the modalities' parts (fusion by gates or FiLM), the scores are those of each modality's own
    head.

    Args:
        base: The probability at which a dominant modality is dropped at least, q_base. (0 <= x <= 1)
        lam: How much of it is added with the lead, λ. (>= 0)
        execute: The share of batches in which anything is dropped, p_exe. (0 <= x <= 1)
        starts: The first epoch, counted from 0, in which it is; the authors' code waits for six. (>= 0)

    Raises:
        InputError: There is an epoch to start at, and the training loop has none.

    References:
        Wei et al., On-the-fly Modulation for Balanced Multimodal Learning, TPAMI 2024, OPM.
    """

    uses_unimodal: ClassVar[bool] = False
    uses_responses: ClassVar[bool] = True
    changes_features: ClassVar[bool] = True
    takes_missing: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (2, 2)

    def __init__(self, base: float = 0.5, lam: float = 0.5, execute: float = 0.7, starts: int = 0) -> None:
        self.base, self.lam, self.execute, self.starts = base, lam, execute, starts
        self._logged: dict[str, Tensor] = {}

    def combine(self, losses: Losses) -> Tensor:
        return losses.joint

    def probabilities(self, responses: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Modality → q, the probability at which its features are dropped."""
        scores = {
            name: torch.softmax(logits.float(), 1).gather(1, labels[:, None]).sum()
            for name, logits in responses.items()
        }
        one, other = scores
        found = {}
        for name, ratio in ((one, scores[one] / scores[other]), (other, scores[other] / scores[one])):
            q = (self.base * (1 + self.lam * torch.tanh(torch.relu(ratio - 1)))).clamp(max=1)
            found[name] = torch.where(ratio > 1, q, torch.zeros_like(q))
        return found

    def fuse(self, features, responses, labels):
        q = self.probabilities(responses, labels)
        self._logged = {f"dropped_{name}": value for name, value in q.items()}
        device = labels.device
        # the draws are made in any case, so that the numbers after them are the same
        drawn = {name: torch.rand(len(made), 1).to(device) for name, made in features.items()}
        if float(torch.rand(())) >= self.execute or not self._drops():
            return features
        widths = {name: made.shape[1] for name, made in features.items()}
        theta = torch.stack([widths[name] * q[name] for name in features]).sum(0) / sum(widths.values())
        kept = {name: (drawn[name] >= q[name]) / (1 - theta).clamp(min=1e-5) for name in features}
        return {name: made * kept[name].to(made.dtype) for name, made in features.items()}

    def before_step(self):
        return super().before_step() | self._logged

    def _drops(self) -> bool:
        if not self.starts:
            return True
        if not self.steps_per_epoch:
            raise InputError("starts: this training has no epochs to count. Leave it at 0.")
        return self._steps // self.steps_per_epoch >= self.starts
