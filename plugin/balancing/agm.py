"""AGM: speeds up or slows down each encoder by how far its response strays from its running average.

Method: adaptive gradient modulation.
Paper: Li, Li, Hu, Lei, Li & Zhou, Boosting Multi-modal Model Performance with Adaptive Gradient Modulation, ICCV 2023.
Option: `alpha` is the paper's α.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.balancing.objective import Backward, Losses, Objective, differentiate

_CAP = 10.0  # of the difference of ratios, against overflow


class AGM(Objective):
    """Trains on the joint loss with each encoder's gradient modulated (AGM), for any number of modalities.

    With s_k the cross-entropy of what modality k alone predicts through the joint head, r_k = exp(mean over j ≠ k of
    s_j − s_k) says how far k is ahead in this batch, and r̂_k is the same of the running averages of s before it. The
    gradient of encoder k is multiplied by exp(α·min(r̂_k − r_k, 10)); in the first step by 1. Where the joint logits are
    no sum of the modalities' parts (fusion by gates or FiLM), each modality's own head predicts.

    The authors' code differs from the paper, and so from this, in three ways: it scales the columns of the joint head
    beside the encoder; it caps a score per example, before the mean; and what a modality alone predicts is the
    joint model's output with the other inputs set to zero, so that the others' biases are in it.

    Args:
        alpha: How strongly a modality is brought back to its average, α. (>= 0)

    References:
        Li et al., Boosting Multi-modal Model Performance with Adaptive Gradient Modulation, ICCV 2023, eq. 9 to 12.
    """

    uses_unimodal: ClassVar[bool] = False
    uses_responses: ClassVar[bool] = True
    takes_missing: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (2, math.inf)

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self._batch: list[Tensor] = []  # scores of a step's forward passes, each (modalities,)
        self._average: Tensor | None = None  # (modalities,) of all earlier steps
        self._steps = 0

    def combine(self, losses: Losses) -> Tensor:
        return losses.joint

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        labels, responses, _ = self.asked(losses)
        logged = super().backward(losses, backward)
        scores = [F.cross_entropy(responses[name].float(), labels) for name in self.encoders]
        self._batch = [*self._batch, torch.stack(scores).clamp(max=-math.log(1e-8))]
        return logged

    @torch.no_grad()
    def before_step(self) -> dict[str, float | Tensor]:
        now = torch.stack(self._batch).mean(0)
        self._batch = []
        coefficients = torch.ones_like(now)
        if self._average is not None:
            self._average = self._average.to(now.device)
            coefficients = (self.alpha * (_ahead(self._average) - _ahead(now)).clamp(max=_CAP)).exp()
        for coefficient, parameters in zip(coefficients, self.encoders.values(), strict=True):
            if grads := [parameter.grad for parameter in parameters if parameter.grad is not None]:
                torch._foreach_mul_(grads, coefficient.to(grads[0].dtype))
        self._steps += 1
        self._average = now if self._average is None else self._average + (now - self._average) / self._steps
        return {f"coefficient_{name}": value for name, value in zip(self.encoders, coefficients, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average, self._steps = state["average"], state["steps"]


def _ahead(scores: Tensor) -> Tensor:
    """exp of the mean over the other modalities of their score minus one's own; a lower score is a better one."""
    others = (scores.sum() - scores) / (len(scores) - 1)
    return (others - scores).exp()
