"""What objectives that go by the epoch have in common: they count their steps."""

from typing import Any

from torch import Tensor

from equipoise.balancing.objective import Objective


class Counted(Objective):
    """Base of objectives that go by how many steps were taken; a subclass adds to `state_dict` what else it has."""

    _steps = 0

    def before_step(self) -> dict[str, float | Tensor]:
        self._steps += 1
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
