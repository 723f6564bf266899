"""How a training ended, as the loop returns it and a run's folder keeps it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """How a run ended when nothing went wrong with the program."""

    state: Literal["done", "stopped", "diverged"]
    message: str = ""  # one sentence for people
    step: int | None = None  # the last step taken
