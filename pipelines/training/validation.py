"""What validations on the way lead to: the best weights so far, and an early end where no better ones come."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.pipelines.config.sections import ValidatedTrainSection
from equipoise.pipelines.training.loop import EarlyStopError


class Validation:
    """The validations of one run, as `train.validate_every`, `train.patience` and `train.keep` want them."""

    def __init__(
        self,
        train: ValidatedTrainSection,
        kept: Mapping[str, Tensor],  # what changes while training, by name
        what: str = "validation loss",  # what is watched, for messages
    ):
        self.train, self.kept, self.what = train, kept, what
        self.best: dict[str, Tensor] = {}  # copies of `kept`, where train.keep wants them
        self.best_loss, self.best_step = math.inf, 0
        self.waited = 0  # validations since

    def begin_step(self) -> None:
        """Raises EarlyStopError where patience is at its end."""
        if self.train.patience and self.waited >= self.train.patience:
            raise EarlyStopError(f"no better {self.what} in {self.train.patience} validations")

    def due(self, taken: int) -> bool:
        """Whether to validate after so many steps; always after the last."""
        every = self.train.validate_every
        return bool(every) and (taken % every == 0 or taken == self.train.steps)

    def take(self, loss: float, taken: int) -> None:
        """What was found after so many steps. Of several processes all must be given the same."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.waited = loss, taken, 0
            if self.train.keep == "best":
                self.best = {name: tensor.detach().clone() for name, tensor in self.kept.items()}
        else:
            self.waited += 1

    @torch.no_grad()
    def settle(self) -> bool:
        """Takes the best weights where they are to be the result; whether it did."""
        if self.best:
            torch._foreach_copy_(list(self.kept.values()), [self.best[name] for name in self.kept])
        return bool(self.best)

    def state(self) -> dict[str, Any]:
        loss = None if math.isinf(self.best_loss) else self.best_loss
        return {"best": self.best, "best_loss": loss, "best_step": self.best_step, "waited": self.waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave; from before there was any, nothing."""
        best = state.get("best", {}) if self.train.keep == "best" else {}  # earlier versions kept them in any case
        self.best = {name: tensor.to(self.kept[name].device) for name, tensor in best.items()}
        self.best_loss = math.inf if state.get("best_loss") is None else state["best_loss"]
        self.best_step, self.waited = state.get("best_step", 0), state.get("waited", 0)
