"""Which of two cells' pictures people preferred without knowing whose they were: kept beside a comparison, counted."""

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equipoise.pipelines.files import append, explained, version

FILE = "votes.jsonl"  # a line for each vote
PREFERRED, VOTES = "preferred", "votes"  # the names of the metrics that they become
MEANING = "share of the blind votes in which it was preferred to another cell; a tie is half"
OUTDATED = "outdated"  # in a vote on what looks different since, which does not count any more


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a comparison's votes: meanwhile nobody else, of whatever process or thread, writes or carries them over.

    Raises:
        InputError: they cannot be written, or lie behind a link.
    """
    handle = _lock(folder / FILE)
    try:
        yield
    finally:
        os.close(handle)


def _lock(path: Path) -> int:
    with explained(path):
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if version(path)[:1] == (os.fstat(handle).st_ino,):
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # the comparison was made anew while this one was waited for


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
    with locked(folder):
        text = lines(folder)
        begun = text and text[-1]  # by hand, without a line break after it
        append(folder / FILE, ("\n" if begun else "") + json.dumps(record) + "\n")


def lines(folder: Path) -> list[bytes]:
    """The file's lines, the last one empty where it ends in a line break."""
    try:
        return (folder / FILE).read_bytes().split(b"\n")
    except OSError:
        return []


def parsed(line: bytes) -> dict[str, Any] | None:
    """A vote, or None of a line that is none."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    cells, preferred = (record.get("cells"), record.get("preferred")) if isinstance(record, dict) else (None, None)
    if isinstance(cells, list) and len(cells) == 2 and all(isinstance(cell, str) for cell in cells):
        return record if preferred is None or preferred in cells else None
    return None


def pairs(folder: Path) -> list[tuple[str, str, str | None]]:
    """The votes that count: the two cells that were seen, and the one that was preferred."""
    records = [record for line in lines(folder) if (record := parsed(line)) and not record.get(OUTDATED)]
    return [(record["cells"][0], record["cells"][1], record.get("preferred")) for record in records]


def left_out(folder: Path) -> list[str]:
    """What of the file does not count, in words: lines that are no votes, and votes that are outdated."""
    records = [parsed(line) for line in lines(folder) if line.strip()]
    found = {
        f"of {FILE} that are no votes": records.count(None),
        f"of {FILE} with votes on what was drawn or answered differently before": sum(
            bool(record and record.get(OUTDATED)) for record in records
        ),
    }
    return [f"{count} line{'s' * (count != 1)} {words}" for words, count in found.items() if count]


def meaning(folder: Path) -> str:
    """What the share is, and what was left out of it."""
    return "; ".join([MEANING, *(f"{words}, left out" for words in left_out(folder))])


def tally(folder: Path) -> dict[str, dict[str, float]]:
    """Of each cell that was voted on, by run id: the share of its votes that it won, and how many there are."""
    won: dict[str, list[float]] = {}
    for first, second, preferred in pairs(folder):
        for cell in (first, second):
            won.setdefault(cell, []).append(0.5 if preferred is None else float(preferred == cell))
    return {cell: {PREFERRED: math.fsum(some) / len(some), VOTES: float(len(some))} for cell, some in won.items()}
