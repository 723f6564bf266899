"""InfoReg: holds the modality that is ahead to where the epoch began, while it still takes in much that is new.

Method: information acquisition regulation.
Paper: Huang, Wei, Yang & Hu, Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition, CVPR 2025,
and the code that its authors released.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.balancing.counted import Counted
from equipoise.balancing.objective import Backward, Losses, differentiate, wide

_KEPT = 10  # epochs whose traces are averaged


class InfoReg(Counted):
    """Trains on joint and unimodal losses, and slows the modality that is ahead (InfoReg); for two modalities.

    The unimodal losses are those of each modality's part of the joint head. With s_k the sum over the batch of what
    that part gives the true class, the encoder that is ahead gets the gradient β·(θ − θ_e) on top, where θ_e are its
    parameters as the epoch began and β = α·exp(tanh(s_k − s_other)). That is done in the prime learning window alone:
    while the trace of its Fisher information grows by more than `growth`. The trace of an epoch is the sum over steps
    and weight tensors of the mean squared gradient; means of ten epochs are compared, shifted by one.

    The authors' code looks at the sound's trace whoever is ahead, and has an α of 0.1 for pictures; here one α holds
    for both, and the trace is that of the modality that is ahead.

    Args:
        alpha: How strongly it is held, α. (>= 0)
        growth: The relative growth of the trace above which the window is open. (>= 0)

    Raises:
        InputError: The training loop has no epochs.

    References:
        Huang et al., Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition, CVPR 2025.
    """

    uses_unimodal: ClassVar[bool] = False
    needs_head = "parts"
    takes_missing: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (2, 2)

    def __init__(self, alpha: float = 0.95, growth: float = 0.05) -> None:
        self.alpha, self.growth = alpha, growth
        self._epoch = -1
        self._scores: Mapping[str, Tensor] = {}  # summed over the forward passes of a step
        self._traces: dict[str, list[float]] = {}  # modality → that of each epoch so far
        self._trace: dict[str, Tensor] = {}  # of this epoch so far
        self._start: dict[str, list[Tensor]] = {}  # parameters as the epoch began

    def combine(self, losses: Losses) -> Tensor:
        _, responses, _ = self.asked(losses)
        return losses.joint + sum(losses.of(said) for said in responses.values())

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        logged = super().backward(losses, backward)
        labels, responses, _ = self.asked(losses)
        scores = {
            name: wide(said.detach()).softmax(1).gather(1, labels[:, None]).sum() for name, said in responses.items()
        }
        self._scores = {name: self._scores.get(name, 0.0) + score for name, score in scores.items()}
        return logged

    @torch.no_grad()
    def before_step(self) -> dict[str, float | Tensor]:
        if (epoch := int(self.epochs(self._steps))) != self._epoch:
            self._begin(epoch)
        super().before_step()
        (one, first), (other, second) = self._scores.items()
        self._scores, logged = {}, {}
        for name, lead in ((one, first - second), (other, second - first)):
            window = self.grows(name) > self.growth
            held = torch.where(lead > 0, self.alpha * torch.tanh(lead).exp(), 0.0) if window else torch.zeros_like(lead)
            logged[f"held_{name}"] = held
            for parameter, start in zip(self.encoders[name], self._start[name], strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(held.to(parameter.dtype) * (parameter - start))
            found = [p.grad.square().mean() for p in self.encoders[name] if p.grad is not None and p.ndim > 1]
            mean = self._trace[name] + sum(found)
            # a step that overflowed in half precision is skipped, and must not shut the window for ten epochs
            self._trace[name] = torch.where(mean.isfinite(), mean, self._trace[name])
        return logged

    def grows(self, name: str) -> float:
        """By what share a modality's trace has grown; 1 in the first epoch."""
        traces = self._traces[name]
        now, before = (sum(some) / _KEPT for some in (traces[-_KEPT:], traces[-_KEPT - 1 : -1]))
        return (now - before) / now if now else 1.0 - bool(traces)

    def _begin(self, epoch: int) -> None:
        for name, parameters in self.encoders.items():
            done = [float(self._trace[name])] if name in self._trace else []
            self._traces[name] = [*self._traces.get(name, []), *done][-_KEPT - 1 :]
            self._trace[name] = torch.zeros((), device=parameters[0].device if parameters else None)
            self._start[name] = [parameter.detach().clone() for parameter in parameters]
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "epoch": self._epoch,
            "traces": dict(self._traces),
            "trace": {name: float(value) for name, value in self._trace.items()},
            "start": {name: list(tensors) for name, tensors in self._start.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._epoch, self._traces = state["epoch"], dict(state["traces"])
        where = {name: parameters[0].device for name, parameters in self.encoders.items() if parameters}
        self._trace = {name: torch.tensor(value, device=where.get(name)) for name, value in state["trace"].items()}
        self._start = {name: [t.to(where.get(name)) for t in tensors] for name, tensors in state["start"].items()}
