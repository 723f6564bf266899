"""How a training ended, as the loop returns it and a run's folder keeps it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """How a run ended when nothing went wrong with the program."""

    state: Literal["done", "stopped", "diverged"]
    message: str = ""  # one sentence for people
    step: int | None = None  # the last step taken


def ending(state: str, message: str, at: str = "") -> str:
    """How a run ended, for one line: its state, `at` which step, and its message, which may begin with the state."""
    return message if message.startswith(state) else f"{state}{at}. {message}".rstrip()
