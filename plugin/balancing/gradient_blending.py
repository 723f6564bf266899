"""Gradient-Blending: weighs the joint and every unimodal loss by how much each gains against how much it overfits.

Method: Gradient-Blending, offline.
Paper: Wang, Tran & Feiszli, What Makes Training Multi-modal Classification Networks Hard?, CVPR 2020.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.balancing.objective import Backward, Losses, Objective, Reached, differentiate
from equipoise.errors import InputError

JOINT = "joint"
_LEAST = 1e-6  # of the squared overfitting, for a loss that does not overfit at all


class GradientBlending(Objective):
    """Trains on the joint and all unimodal losses, weighted by Gradient-Blending, for any number of modalities.

    Minimizes Σ_k w_k·f_k over the joint loss and the unimodal ones. Before, each modality by itself and the joint model
    are trained for as many steps; with G_k what its validation loss has fallen by, and O_k what the gap between its
    validation and its training loss has grown by, w_k = (G_k/O_k²)/Z, so that the weights sum to 1. What gains nothing
    weighs nothing. O_k is at least ε_k = σ/√n_k, where σ is the largest standard deviation of a validation loss at the
    end over the clips, and n_k how many clips loss k is of: smaller gaps are noise, and where nothing has been learned
    1/O_k² of it would outweigh all else. The paper has no such bound. That makes three trainings of one. (Offline; the
    paper's online form estimates anew on the way.)

    Args:
        weights: Name → weight, of `joint` and of every modality, in place of estimating them. (each >= 0)

    Raises:
        InputError: weights do not name the joint loss and every modality; or nothing has estimated them.

    References:
        Wang et al., What Makes Training Multi-modal Classification Networks Hard?, CVPR 2020, Proposition 1 and
        Algorithm 1.
    """

    modalities: ClassVar[tuple[int, float]] = (1, math.inf)
    alone_joint: ClassVar[bool] = True
    alone_option: ClassVar[str] = "weights"

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.weights = dict(weights or {})
        self.needs_alone = not weights

    def bind(self, encoders) -> None:
        super().bind(encoders)
        wanted = {JOINT, *encoders}
        if self.weights and self.weights.keys() != wanted:
            raise InputError(f"weights: must be of {', '.join([JOINT, *encoders])}, got {', '.join(self.weights)}.")

    def take_alone(self, reached: Mapping[str, Reached]) -> str:
        deviations = [found.noise * math.sqrt(found.examples) for found in reached.values()]
        # of a loss of one clip alone it is not known
        widest = max((deviation for deviation in deviations if math.isfinite(deviation)), default=math.inf)
        shares = {name: share(found, widest / math.sqrt(found.examples)) for name, found in reached.items()}
        total = sum(shares.values())
        even = 1 / len(shares)  # where nothing has gained anything
        self.weights = {name: value / total if total else even for name, value in shares.items()}
        self.needs_alone = False
        return f"weights: {', '.join(f'{name} {value:.4g}' for name, value in self.weights.items())}."

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        return super().backward(losses, backward) | {f"weight_{name}": value for name, value in self.weights.items()}

    def combine(self, losses: Losses) -> Tensor:
        if self.needs_alone:
            raise InputError("weights: this training does not estimate them, as audio-visual classification does.")
        parts = {JOINT: losses.joint, **losses.unimodal}
        return torch.stack([self.weights[name] * loss for name, loss in parts.items()]).sum()

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.needs_alone = dict(state["weights"]), not state["weights"]


def share(found: Reached, noise: float = 0.0) -> float:
    """G/O², at least 0; O is at least `noise`."""
    gain = found.validation_first - found.validation_last
    grown = (found.validation_last - found.train_last) - (found.validation_first - found.train_first)
    return max(gain, 0.0) / max(grown**2, noise**2, _LEAST)
