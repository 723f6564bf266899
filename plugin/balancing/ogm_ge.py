"""OGM-GE: slows the dominant modality's encoder by how far its predictions are ahead, and adds noise.

Method: on-the-fly gradient modulation with generalization enhancement.
Paper: Peng, Wei, Deng, Wang & Hu, Balanced Multimodal Learning via On-the-fly Gradient Modulation, CVPR 2022.
Options: `alpha` is the paper's α; `noise` is GE; `tensors="convolutions"` is what the authors modulate; `starts` and
`ends` are their modulation_starts and modulation_ends.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from equipoise.balancing.objective import Backward, Losses, Objective, differentiate
from equipoise.errors import InputError


class OGMGE(Objective):
    """Trains on the joint loss with the dominant encoder's gradient reduced (OGM-GE); for two modalities.

    With s_k the sum over the batch of the softmax score that modality k alone gives to the true class through the joint
    head, ρ_k = s_k/s_other, and the gradients of encoder k are multiplied by 1 − tanh(α·relu(ρ_k)) where ρ_k > 1; then
    noise from N(0, std(gradient)) is added to both encoders'. Where the joint logits are no sum of the modalities'
    parts (fusion by gates or FiLM), the scores are those of each modality's own head.

    Args:
        alpha: How strongly the dominant modality is slowed, α. (>= 0)
        noise: Add the noise (GE).
        tensors: "convolutions": the gradients of convolution weights alone, as the authors do, and every gradient of an
            encoder that has no convolutions, as those of text. "all": every gradient of both encoders.
        starts: The first epoch, counted from 0, in which gradients are modulated. (>= 0)
        ends: The last such epoch; none: to the end. The authors' code has 50 of 100. (>= 0)

    Raises:
        InputError: There is an epoch to start or to end at, and the training loop has none.

    References:
        Peng et al., Balanced Multimodal Learning via On-the-fly Gradient Modulation, CVPR 2022, eq. 8 to 12.
    """

    uses_unimodal: ClassVar[bool] = False
    uses_responses: ClassVar[bool] = True
    takes_missing: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (2, 2)

    def __init__(
        self,
        alpha: float = 0.8,
        noise: bool = True,
        tensors: Literal["convolutions", "all"] = "convolutions",
        starts: int = 0,
        ends: int | None = None,
    ) -> None:
        self.alpha, self.noise, self.tensors = alpha, noise, tensors
        self.starts, self.ends = starts, ends
        self._steps = 0
        self._scores: dict[str, Tensor] = {}  # summed over the forward passes of a step

    def combine(self, losses: Losses) -> Tensor:
        return losses.joint

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        labels, responses, _ = self.asked(losses)
        logged = super().backward(losses, backward)
        for name, logits in responses.items():
            true = torch.softmax(logits.float(), 1).gather(1, labels[:, None]).sum()
            self._scores = {**self._scores, name: self._scores.get(name, 0.0) + true}
        return logged

    @torch.no_grad()
    def before_step(self) -> dict[str, float | Tensor]:
        one, other = self.encoders
        ratio = self._scores[one] / self._scores[other]
        self._scores = {}
        if not self._modulates():
            return {f"coefficient_{name}": 1.0 for name in self.encoders}
        logged: dict[str, Any] = {}
        for name, ahead in ((one, ratio), (other, 1 / ratio)):
            coefficient = torch.where(ahead > 1, 1 - torch.tanh(self.alpha * torch.relu(ahead)), 1.0)
            logged[f"coefficient_{name}"] = coefficient
            parameters = self.encoders[name]
            if self.tensors == "convolutions":
                parameters = [parameter for parameter in parameters if parameter.ndim == 4] or parameters
            for parameter in parameters:
                if parameter.grad is None:
                    continue
                deviation = parameter.grad.std(correction=min(1, parameter.numel() - 1)) + 1e-8  # of the raw gradient
                parameter.grad.mul_(coefficient.to(parameter.grad.dtype))
                if self.noise:
                    parameter.grad.add_(torch.randn_like(parameter.grad) * deviation)
        return logged

    def _modulates(self) -> bool:
        """Whether this step, which it counts, lies in an epoch in which gradients are modulated."""
        step, self._steps = self._steps, self._steps + 1
        if not self.starts and self.ends is None:
            return True
        if not self.steps_per_epoch:
            raise InputError("starts, ends: this training has no epochs to count. Leave them empty.")
        return self.starts <= step // self.steps_per_epoch <= (math.inf if self.ends is None else self.ends)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state.get("steps", 0)  # earlier versions had no window, and counted none
