"""What people write to a run: a name, a note, tags, and whether it is put away; in a file of the run's folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines.files import version, write_atomic
from equipoise.pipelines.runs.run import Run

FILE = "notes.json"
MOST_NOTE, MOST_TAG, MOST_TAGS, MOST_NAME = 10_000, 40, 20, 100  # characters, characters, tags, characters


@dataclass(frozen=True)
class Notes:
    note: str = ""
    tags: tuple[str, ...] = ()
    archived: bool = False  # not in the table unless it is asked for
    name: str = ""  # shown in place of the id, which stays


def read(folder: Path) -> Notes:
    """What is written to the run in a folder; nothing where the file is not there or is none."""
    file = folder / FILE
    return _read(file, *found) if (found := version(file)) else Notes()


@lru_cache(10_000)
def _read(file: Path, *version: int) -> Notes:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        name = str(data.get("name", ""))  # which earlier versions did not have
        return Notes(str(data["note"]), tuple(map(str, data["tags"])), data["archived"] is True, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Notes()


def write(run: Run, note: str, tags: str, archived: bool, name: str = "") -> None:
    """Writes them. `tags`: with commas between.

    Raises:
        InputError: too much of it, or the folder cannot be written.
    """
    found = list(dict.fromkeys(tag.strip() for tag in tags.split(",") if tag.strip()))
    if len(note) > MOST_NOTE:
        raise InputError(f"The note has {len(note)} characters; {MOST_NOTE} are the most.")
    if len(found) > MOST_TAGS or max(map(len, found), default=0) > MOST_TAG:
        raise InputError(f"At most {MOST_TAGS} tags of at most {MOST_TAG} characters can be given.")
    if len(name := " ".join(name.split())) > MOST_NAME or not name.isprintable():
        raise InputError(f"A name is one line of at most {MOST_NAME} characters.")
    _write(run, Notes(note.strip(), tuple(found), archived, name))


def archive(runs: Sequence[Run], archived: bool) -> None:
    """Puts runs away, or back."""
    for run in runs:
        _write(run, replace(read(run.folder), archived=archived))


def _write(run: Run, notes: Notes) -> None:
    write_atomic(run.folder / FILE, json.dumps(asdict(notes), ensure_ascii=False, indent=1) + "\n")
