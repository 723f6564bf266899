"""The files of a data set: one file, all files of a pattern or of a folder, or a data set at the hub."""

import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.formats import tables, tars, texts
from equipoise.pipelines.instruction_tuning.formats.rows import Row

READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": texts.json_list,
    ".jsonl": texts.jsonl,
    ".csv": texts.table,
    ".parquet": tables.parquet,
    ".arrow": tables.arrow,
    ".tar": tars.tar,
    ".tar.gz": tars.tar,
    ".tgz": tars.tar,
}
_SHARDS = (".parquet", ".arrow", ".tar", ".tar.gz", ".tgz", ".jsonl")  # what a folder may be a data set of
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z])")


def is_hub(source: str) -> bool:
    return source.startswith(tables.HUB)


def files(source: str) -> list[Path]:
    """The files of a data set on this machine, in their order.

    Raises:
        InputError: why there are none, a sentence that goes on after the source's name.
    """
    path = Path(source)
    if os.path.isfile(path):  # unlike pathlib's, False also where no path can be so long
        if _suffix(path) not in READERS:
            raise InputError(f"is not {', '.join(list(READERS)[:5])} or .tar.")
        return [path]
    if os.path.isdir(path):
        return tables.saved(path) or _shards(_inside(path), path)
    if "*" in path.name and os.path.isdir(path.parent):
        if found := [file for file in _inside(path.parent) if fnmatchcase(file.name, path.name)]:
            return _shards(found, path.parent)
        raise InputError("matches no file.")
    raise InputError("does not exist.")


def rows(file: Path) -> Iterator[Row]:
    """The rows of one file.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is no text.
        InputError: a package is missing.
    """
    return READERS[_suffix(file)](file)


def _suffix(file: Path) -> str:
    name = file.name.lower()
    return ".tar.gz" if name.endswith(".tar.gz") else file.suffix.lower()


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}.") from None


def _shards(found: list[Path], folder: Path) -> list[Path]:
    chosen = [file for file in found if _suffix(file) in _SHARDS and file.is_file()]
    kinds = sorted({_suffix(file) for file in chosen})
    if not kinds:
        raise InputError("is a folder; give the file of conversations in it.")
    if len(kinds) > 1:
        raise InputError(f"holds files of several formats ({', '.join(kinds)}). Give {folder}/*{kinds[0]}, for one.")
    splits = {match[1] if (match := _SPLIT.match(file.name)) else "" for file in chosen}
    if len(splits) > 1:
        named = sorted(splits - {""})
        raise InputError(f"holds several splits ({', '.join(named)}). Give {folder}/{named[-1]}*{kinds[0]}, for one.")
    return chosen
