"""Which of two cells' pictures people preferred without knowing whose they were: kept beside a comparison, counted."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from equipoise.pipelines.files import append, json_lines

FILE = "votes.jsonl"  # a line for each vote
PREFERRED, VOTES = "preferred", "votes"  # the names of the metrics that they become
MEANING = "share of the blind votes in which it was preferred to another cell; a tie is half"


def cast(folder: Path, cells: Sequence[str], picture: str, preferred: str | None) -> None:
    """Adds a vote, or nothing of it.

    Args:
        folder: the comparison's.
        cells: the two that were seen, by run id ("" is the base), in the order in which they were seen.
        picture: which of their pictures, or answers.
        preferred: one of the two; None: neither.

    Raises:
        InputError: it cannot be written.
    """
    record = {"cells": list(cells), "picture": picture, "preferred": preferred, "time": time.time()}
    append(folder / FILE, json.dumps(record) + "\n")


def pairs(folder: Path) -> list[tuple[str, str, str | None]]:
    """The votes: the two cells that were seen, and the one that was preferred. What is no vote is left out."""
    try:
        records = [record for _, record in json_lines(folder / FILE)]
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for record in records:
        cells, preferred = (record.get("cells"), record.get("preferred")) if isinstance(record, dict) else (None, None)
        if isinstance(cells, list) and len(cells) == 2 and all(isinstance(cell, str) for cell in cells):
            if preferred is None or preferred in cells:
                found.append((cells[0], cells[1], preferred))
    return found


def tally(folder: Path) -> dict[str, dict[str, float]]:
    """Of each cell that was voted on, by run id: the share of its votes that it won, and how many there are."""
    won: dict[str, list[float]] = {}
    for first, second, preferred in pairs(folder):
        for cell in (first, second):
            won.setdefault(cell, []).append(0.5 if preferred is None else float(preferred == cell))
    return {cell: {PREFERRED: math.fsum(some) / len(some), VOTES: float(len(some))} for cell, some in won.items()}
