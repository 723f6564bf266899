"""The votes on a comparison that is made anew: those on what looks as it did go on counting."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines.comparing import votes
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.files import write_atomic


@contextmanager
def carried_votes(folder: Path, made: Comparison) -> Iterator[int]:
    """Writes the votes on the comparison in `folder` beside the one that takes its place, and counts them there.

    Whoever votes meanwhile waits until it has. A vote on a picture or an answer that is not the same any more, to the
    byte, is kept in the file and does not count.

    Yields:
        How many are of that kind now, and were not before.

    Raises:
        InputError: they cannot be written.
    """
    if not (folder / votes.FILE).exists() and not (folder / "table.json").exists():
        yield 0
        return
    with votes.locked(folder):
        outdated, lines = 0, []
        before = _read(folder)
        for line in votes.lines(folder):
            record = votes.parsed(line)
            if record and not record.get(votes.OUTDATED) and not _is_seen_still(record, before, made):
                outdated, line = outdated + 1, json.dumps(record | {votes.OUTDATED: True}).encode()
            lines.append(line)
        if any(lines):
            write_atomic(made.folder / votes.FILE, b"\n".join(lines))
            made.count_votes()
        yield outdated


def _read(folder: Path) -> Comparison | None:
    try:
        return Comparison.read(folder)
    except InputError:  # of an older version, or broken
        return None


def _is_seen_still(vote: dict, before: Comparison | None, made: Comparison) -> bool:
    """Whether both of a vote's cells drew or answered what they did."""
    if before is None:
        return False
    found = [(_seen(before, run, vote), _seen(made, run, vote)) for run in vote["cells"]]
    return all(one is not None and one == other for one, other in found)


def _seen(comparison: Comparison, run: str, vote: dict) -> bytes | None:
    """What a vote is about, of one of its cells: the file of a picture, or a line of the answers."""
    cell = next((cell for cell in (comparison.base, *comparison.cells) if cell.run == run), None)
    if cell is None:
        return None
    key = str(vote.get("picture"))
    picture = next((picture for picture in cell.pictures if picture.key == key), None)
    try:
        if picture:
            return (comparison.folder / picture.file).read_bytes()
        lines = (comparison.place_of(cell) / "answers.jsonl").read_bytes().split(b"\n")
        return lines[int(key.removeprefix("answer ")) - 1] or None
    except (OSError, ValueError, IndexError):
        return None
