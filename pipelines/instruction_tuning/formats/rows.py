"""What every reader of a file gives."""

from pathlib import Path
from typing import Any, NamedTuple

from equipoise.errors import InputError


class FileError(InputError):
    """What is wrong with a file as a whole, so that none of its rows can be left out in place of it."""


class Row(NamedTuple):
    file: Path | str  # a data set at a hub is no path
    at: str  # "12", a line; "row 12"; "sample 000012"; nothing where it is of the whole file
    record: Any  # or an InputError, in place of what could not be read

    @property
    def where(self) -> str:
        return f"{self.file}:{self.at}" if self.at else str(self.file)
