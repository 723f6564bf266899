"""Coordinate descent: one side alone until it comes to rest, then the other. The baselines Feature CD and Language CD.

Source: Wu et al., CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models, Section 7, after Wright,
Coordinate descent algorithms, 2015. "Until its weights stabilize" is all the paper says of the change; here a side is
at rest once it moves, over `window` steps, by less than `rest` of the way it went over the first such window.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from equipoise.coordination.balance import Metric, sides
from equipoise.coordination.coordinator import Measured, split


class FeatureDescent(Measured):
    """Trains the encoder side until it comes to rest, then the language side (Feature CD).

    ‖θ_t − θ_{t−window}‖ < rest · ‖θ_window − θ_0‖ ends the first part, and `latest` of the run's steps at the latest.
    Where the model leans to one side this can help; the paper found that no fixed order helps everywhere.

    References:
        Wu et al., CoMMIT, Section 7 and Table 1, Feature CD.
    """

    two_sided = True
    _first_is_language = False

    def __init__(
        self,
        window: int = 20,
        rest: float = 0.5,
        latest: float = 0.5,
        measure_every: int = 0,
        metric: Metric = "jensen_shannon",
    ):
        """
        Args:
            window: Steps over which the way is measured (>= 1); the first way is that from after the first step.
            rest: Share of the first window's way below which the side counts as at rest (0 <= x <= 1).
            latest: Share of the run after which the sides change in any case (0 < x <= 1).
        """
        super().__init__(measure_every, metric)
        self.window, self.rest, self.latest = window, rest, latest
        self.changed_at = -1  # the step after which the second side trains; -1 before that
        self._first_way = 0.0
        self._then: list[Tensor] = []  # the first side's weights when the window began

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        language = float(self._first_is_language is (self.changed_at < 0))
        return split(components, language, 1.0 - language)

    @torch.no_grad()
    def stepped(self, components: Mapping[str, Sequence[Tensor]], step: int, steps: int) -> None:
        if self.changed_at >= 0:
            return
        side = sides(components)[0 if self._first_is_language else 1]
        if not self._then:
            self._then = [tensor.detach().clone() for tensor in side]
        elif (step + 1) % self.window == 0:
            self._then = [old.to(new.device) for old, new in zip(self._then, side, strict=True)]  # after a resume
            moved = torch._foreach_sub([tensor.detach() for tensor in side], self._then)
            way = torch.stack([norm.float() for norm in torch._foreach_norm(moved)]).norm().item()
            if self._first_way and way < self.rest * self._first_way:
                self.changed_at = step
            self._first_way = self._first_way or way
            torch._foreach_copy_(self._then, [tensor.detach() for tensor in side])
        if step + 1 >= self.latest * steps:
            self.changed_at = step
        if self.changed_at >= 0:
            self._then = []

    def state_dict(self) -> dict:
        return {"changed_at": self.changed_at, "first_way": self._first_way, "then": list(self._then)}

    def load_state_dict(self, state: dict) -> None:
        self.changed_at, self._first_way = state["changed_at"], state["first_way"]
        self._then = list(state["then"])


class LanguageDescent(FeatureDescent):
    """Trains the language side until it comes to rest, then the encoder side (Language CD).

    References:
        Wu et al., CoMMIT, Section 7 and Table 1, Language CD.
    """

    _first_is_language = True
