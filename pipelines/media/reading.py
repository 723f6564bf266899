"""What the readers share: their errors, the version of what they give, and a memory that spares a second decoding."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from equipoise.errors import InputError
from equipoise.pipelines.files import version

VERSION = 2  # of what the readers give for a file: part of every key that something made of it is kept under
MEMORY = 1 << 29  # bytes of decoded files that are kept during a run; what does not fit is decoded again

T = TypeVar("T")


class MediaError(InputError):
    """A file that cannot be read; `problem` is the sentence without the file's name before it."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"{path}: {problem}")
        self.problem = problem


class AbsentError(MediaError):
    """A file without a track of the kind that was asked for."""


class EnormousError(MediaError):
    """A picture of more pixels than are decoded."""


def brief(error: Exception) -> str:
    """A decoder's own words, on one line, to be put into a sentence."""
    return " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__


_kept: dict[tuple[Any, ...], tuple[Any, int]] = {}  # (reader, path, version of the file) → (what it gave, bytes)
_lock = Lock()
_runs = 0  # that are inside of `decoded_once`


@contextmanager
def decoded_once() -> Iterator[None]:
    """Until the block ends, files that were decoded are kept for whoever asks next, as far as MEMORY goes."""
    global _runs
    with _lock:
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
        if not _runs:
            forget()


def forget(path: Path | None = None) -> None:
    """Frees what is kept, or what is kept of one file: nobody will ask for it again."""
    with _lock:
        for key in [key for key in _kept if path is None or key[1] == os.path.abspath(path)]:
            del _kept[key]


def content(path: Path) -> str:
    """A digest of a file's content, computed once for as long as the file stays as it is.

    Raises:
        MediaError: it cannot be read.
    """
    try:
        return _digest(os.path.abspath(path), version(path))
    except OSError as error:
        raise MediaError(path, f"cannot be read: {error.strerror or error}.") from None


@lru_cache(1 << 17)
def _digest(path: str, _: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def kept(read: Callable[[Path], T], path: Path) -> T | None:  # shared with others who ask: not to be changed
    """What is in memory of a file as it is now."""
    return _kept.get((read, os.path.abspath(path), *version(path)), (None, 0))[0]


def once(
    read: Callable[[Path], T],
    path: Path,
    size: Callable[[T], int],  # bytes of what was read
) -> T:  # shared with others who ask: not to be changed
    """What `read` gives for a file, from memory where the same file was read before within `decoded_once`."""
    key = (read, os.path.abspath(path), *version(path))
    if key in _kept:
        return _kept[key][0]
    made = read(path)
    with _lock:
        if _runs and sum(held for _, held in _kept.values()) + size(made) <= MEMORY:
            _kept[key] = made, size(made)
    return made
