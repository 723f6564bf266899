"""MLA: modalities take turns through one head, whose gradient is kept off the directions it has learned from.

Method: multimodal learning with alternating unimodal adaptation.
Paper: Zhang, Yoon, Bansal & Yao, Multimodal Representation Learning by Alternating Unimodal Adaptation, CVPR 2024, and
the code that its authors released.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.balancing.objective import Backward, Losses, Objective, differentiate, wide
from equipoise.errors import InputError


class MLA(Objective):
    """Trains one modality in each step, in turn, through a head that all share (MLA), for any number of them.

    A step's loss is that of one modality's prediction. The gradient of the head's weight is multiplied by P from the
    right, before which h, the mean of the features in the step, is taken out of P: P ← P − Ph(Ph)ᵀ/(a + hᵀPh), then
    P ← P/‖P‖. a is 0.1^(1 + the share of the epoch that is done). P begins as the identity, and the first step's
    gradient is left as it is. How the joint prediction weighs the modalities, by exp(−entropy), is the model's:
    `model.fusion=shared`.

    The authors' code trains every modality in turn on the same batch, which is as many of these steps: beside other
    objectives, to train as they do takes as many times their steps as there are modalities. It also divides by
    a + h·(Ph)ᵀ, element by element, where the update of the paper and its source has a number; and weighs modalities
    by entropies over a whole batch at the test, where here each clip has its own.

    Raises:
        InputError: The training loop has no epochs, or no head that all modalities share.

    References:
        Zhang et al., Multimodal Representation Learning by Alternating Unimodal Adaptation, CVPR 2024.
    """

    uses_unimodal: ClassVar[bool] = False
    uses_features: ClassVar[bool] = True
    needs_head = "shared"
    takes_missing: ClassVar[bool] = False
    needs_all: ClassVar[str] = "weighs every modality of every clip"
    modalities: ClassVar[tuple[int, float]] = (2, math.inf)

    def __init__(self) -> None:
        self._steps = 0
        self._means: list[Tensor] = []  # of the features in the forward passes of a step, each (width,)
        self._projection: Tensor | None = None  # P, (width, width)

    def turn(self) -> str:
        """The modality that is trained in this step."""
        return list(self.encoders)[self._steps % len(self.encoders)]

    def combine(self, losses: Losses) -> Tensor:
        _, responses, _ = self.asked(losses)
        return losses.of(responses[self.turn()])

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        logged = super().backward(losses, backward)
        _, _, features = self.asked(losses)
        self._means = [*self._means, wide(features[self.turn()].detach()).mean(0)]
        return logged

    @torch.no_grad()
    def before_step(self) -> dict[str, float | Tensor]:
        share = self.epochs(self._steps) % 1
        weight = next((parameter for parameter in self.joint_head if parameter.ndim == 2), None)
        if weight is None or weight.grad is None:
            raise InputError("MLA needs a head that all modalities share, which this training does not give.")
        mean = torch.stack(self._means).mean(0)
        mean = F.pad(mean, (0, weight.shape[1] - len(mean)))  # narrower features are filled up with zeros
        self._means = []
        projection = self._projection
        if projection is None:
            projection = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        if self._steps:
            moved = projection @ mean
            left = projection - torch.outer(moved, moved) / (0.1 ** (1 + share) + mean @ moved)
            projection = left / left.norm()
            weight.grad.copy_(weight.grad @ projection.T.to(weight.grad.dtype))
        self._steps, self._projection = self._steps + 1, projection
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "projection": self._projection}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._projection = state["steps"], state["projection"]
        if self._projection is not None and self.joint_head:
            self._projection = self._projection.to(self.joint_head[0].device)
