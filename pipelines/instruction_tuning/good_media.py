"""Media that were found to be good, so that those that stay as they are need not be decoded for every check."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from equipoise.pipelines.files import version
from equipoise.pipelines.media.reading import VERSION

_DIGITS = 16  # of a line
_known: set[str] = set()  # in this process, for a check comes before its run


class GoodMedia:
    """What is known of media on disk, by their names, sizes and times.

    Args:
        file: where it is kept from run to run, a line each; None: in this process alone.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self._kept: set[str] = set()  # in the file
        with suppress(OSError, UnicodeDecodeError):
            self._kept = set(file.read_text("ascii").splitlines()) if file else set()
            _known.update(self._kept)

    def has(self, line: str | None) -> bool:
        return line in _known

    def add(self, lines: Iterable[str]) -> None:
        """Lines of before the media were looked at, for they may be written anew meanwhile. The file is written where
        there is a folder of runs: a check makes none."""
        lines = list(lines)
        _known.update(lines)
        new = [line for line in lines if line not in self._kept]
        if not new or self.file is None or not self.file.parent.parent.is_dir():
            return
        with suppress(OSError):  # then it is looked at again
            self.file.parent.mkdir(exist_ok=True)
            with open(self.file, "a", encoding="ascii") as file:
                file.write("".join(f"{line}\n" for line in new))
            self._kept.update(new)


def line_of(path: Path, kind: str) -> str | None:
    """What stands for a file as it is now, and for nothing else; None where there is none."""
    if not (now := version(path)):
        return None
    known = repr((VERSION, kind, os.path.abspath(path), now))
    return hashlib.blake2b(known.encode("utf-8", "surrogateescape"), digest_size=_DIGITS // 2).hexdigest()
