"""Diagnosing & Re-learning: moves each encoder back towards its start now and then, far where it generalizes badly.

Method: Diagnosing & Re-learning.
Paper: Wei, Li, Feng & Hu, Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, and the code that its
authors released. Options: `lam` is their move_lambda, `every` reinit_epoch, `times` reinit_num.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.balancing.clusters import purity
from equipoise.balancing.objective import Losses, Objective
from equipoise.errors import InputError


class Relearning(Objective):
    """Trains on the joint loss and re-initialises encoders softly (Diagnosing & Re-learning), for any number.

    Every so many epochs k-means is run on each encoder's features of the training and of the validation examples, in as
    many clusters as classes. The gap of purity between the two says how far the encoder generalizes, and its parameters
    become w·θ₀ + (1 − w)·θ with w = tanh(λ·gap), θ₀ being those it began with. An encoder that has fitted its training
    examples too closely is moved back far, and one that has learned little yet hardly.

    Args:
        lam: How far an encoder is moved back, λ. (>= 0)
        every: Epochs between two such times. (> 0)
        times: How many such times there are. (>= 0)

    Raises:
        InputError: The training loop has no epochs, or gives no features.

    References:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024.
    """

    uses_unimodal: ClassVar[bool] = False
    takes_missing: ClassVar[bool] = False
    needs_all: ClassVar[str] = "clusters the features of every clip"
    modalities: ClassVar[tuple[int, float]] = (1, math.inf)

    def __init__(self, lam: float = 3.0, every: float = 20.0, times: int = 3) -> None:
        self.lam, self.every, self.times = lam, every, times
        self._steps, self._done = 0, 0
        self._moved: dict[str, float] = {}  # of the last time, logged once
        self._first: dict[str, list[Tensor]] = {}

    def bind(self, encoders) -> None:
        super().bind(encoders)
        self._first = {name: [p.detach().clone() for p in parameters] for name, parameters in encoders.items()}

    def combine(self, losses: Losses) -> Tensor:
        return losses.joint

    def wants_features(self) -> bool:
        if not self.steps_per_epoch:
            raise InputError("Relearning counts epochs, and this training has none.")
        return self._done < self.times and self._steps >= (self._done + 1) * self.every * self.steps_per_epoch

    @torch.no_grad()
    def take_features(self, train, train_labels, validation, validation_labels) -> str:
        """Diagnoses, and moves the encoders back."""
        self._done = min(self.times, max(self._done + 1, int(self._steps / (self.every * self.steps_per_epoch))))
        said = []
        for name, parameters in self.encoders.items():
            gap = abs(purity(train[name], train_labels) - purity(validation[name], validation_labels))
            weight = math.tanh(self.lam * gap)
            self._moved[f"moved_{name}"] = weight
            said.append(f"{name} by {weight:.3f}, for its purity differs by {gap:.3f}")
            for parameter, first in zip(parameters, self._first[name], strict=True):
                parameter.copy_(weight * first.to(parameter.device) + (1 - weight) * parameter)
        return f"moved back towards the start: {', '.join(said)}."

    def before_step(self) -> dict[str, float | Tensor]:
        if self.wants_features():
            raise InputError("Relearning needs the encoders' features, which this training does not give.")
        self._steps += 1
        moved, self._moved = self._moved, {}
        return dict(moved)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._done = state["steps"], state["done"]
