"""Captions in tables beside the pictures: `metadata.jsonl`, `metadata.csv` or `metadata.parquet`.

As the datasets library's image folders have them: the columns `file_name` and `text`, and a table for the pictures
below its own folder, those with a nearer table excepted.
"""

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.pipelines.files import first_line, json_lines

ENCODING = "utf-8-sig"  # with or without the mark that Excel and Notepad put first
_LISTED = 3  # names in a sentence


@dataclass
class Captions:
    """What tables say of pictures: in the order of their rows, with all that is wrong and all that is doubtful."""

    found: list[tuple[Path, str]] = field(default_factory=list)  # a picture may have several
    governed: set[Path] = field(default_factory=set)  # pictures that a table is for
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def tables_among(files: Iterable[Path]) -> list[Path]:
    """The tables among files: the first kind in each folder, those of deeper folders first."""
    there = {(file.parent, file.name) for file in files if file.name in _READERS}
    folders = sorted({folder for folder, _ in there}, key=lambda folder: (-len(folder.parts), folder))
    return [next(folder / name for name in _READERS if (folder, name) in there) for folder in folders]


def read_tables(tables: Iterable[Path], pictures: Iterable[Path], left_out: Set[Path] = frozenset()) -> Captions:
    """The captions that tables have for pictures.

    Args:
        tables: As `tables_among` gives them.
        pictures: All of the folder's that are wanted.
        left_out: Those that are not; tables may name them.
    """
    made, left = Captions(), dict.fromkeys([*pictures, *left_out])
    for table in tables:
        below = [path for path in left if path.is_relative_to(table.parent)]
        for path in below:
            del left[path]
        made.governed.update(below)
        _read(table, below, made, left_out)
    return made


def _read(table: Path, pictures: list[Path], made: Captions, left_out: Set[Path]) -> None:
    """Adds what one table says of the pictures that it is for."""
    rows: list[tuple[Path, str]] = []
    problems: list[str] = []
    known = _Names(table.parent, pictures)
    try:
        for line, row in _READERS[table.name](table):
            if isinstance(row, Exception):
                problems.append(f"{table}: cannot be read (line {line}: {row}).")
                continue
            name, text = row.get("file_name"), row.get("text")
            if None in row:
                problems.append(
                    f"{table}:{line}: has more cells than columns. Put double quotes around a caption with commas."
                )
            elif not isinstance(name, str) or not isinstance(text, str):
                got = ", ".join(map(str, row)) or "nothing"
                problems.append(f"{table}:{line}: needs file_name and text, got {got}.")
            elif (path := known.find(name)) is None:
                problems.append(f"{table}:{line}: a caption for {name}, which is not in {table.parent}.")
            else:
                rows.append((path, text))
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{table}: cannot be read ({error}).")
    if not rows and not problems and not left_out >= set(pictures):
        problems.append(f"{table}: holds no captions.")
    rows = [(path, text) for path, text in rows if path not in left_out]
    captioned = [path for path, _ in rows]
    missing = sorted(set(pictures) - set(captioned) - left_out)
    if missing and not problems:
        problems.append(
            f"{table}: has no captions for {listed(missing, table.parent)}. Add their lines, take the pictures away, "
            "or set data.instance_prompt."
        )
    if twice := sorted(path for path, times in Counter(captioned).items() if times > 1):
        made.doubts.append(
            f"{table}: names {listed(twice, table.parent)} more than once; each line counts as a picture of its own."
        )
    made.found += rows
    made.problems += problems


class _Names:
    """Pictures by the names that a table may have for them: é may be written as one character or as two (macOS does),
    and Windows separates folders by a backslash."""

    def __init__(self, folder: Path, pictures: list[Path]):
        self.folder, self.exact = folder, set(pictures)
        self.composed = {unicodedata.normalize("NFC", str(path)): path for path in pictures}

    def find(self, name: str) -> Path | None:
        for written in (name, name.replace("\\", "/")):
            path = Path(os.path.normpath(self.folder / written))
            if path in self.exact:
                return path
            if (found := self.composed.get(unicodedata.normalize("NFC", str(path)))) is not None:
                return found
        return None


def listed(paths: Iterable[Path], folder: Path) -> str:
    """The first names of paths below a folder, and how many more there are."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
    for number, value in json_lines(path):
        yield number, value if isinstance(value, dict | Exception) else {}


def _read_csv(path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    with path.open(newline="", encoding=ENCODING) as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield first_line(reader, row.values()), row


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("it needs the package pyarrow: pip install pyarrow, or save the table as CSV") from None
    with parquet.ParquetFile(path) as file:  # its errors are ValueErrors and OSErrors
        columns = [name for name in file.schema_arrow.names if name in ("file_name", "text")]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[Any, Any] | Exception]]]] = {
    "metadata.jsonl": _read_jsonl,
    "metadata.csv": _read_csv,
    "metadata.parquet": _read_parquet,
}
