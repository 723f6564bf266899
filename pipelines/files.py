"""Writing files so that a reader, or a crash, never meets half of one."""

import errno
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError, InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def user_path(text: str) -> Path:
    """A path as a user wrote it; `~` is the home folder, also where no shell sees to it, as in `--output=~/x`."""
    return Path(os.path.expanduser(text))


def disk_full(error: BaseException) -> bool:
    """Whether that was the disk; SQLite and libraries written in Rust or C++ say so in words only."""
    words = ("No space left on device", "database or disk is full")
    return getattr(error, "errno", None) in _FULL or any(word in str(error) for word in words)


def first_line(reader: Any, cells: Iterable[Any]) -> int:
    """The line that the row just read by a reader of `csv` begins in, which itself knows only where it ends."""
    lists = [cell if isinstance(cell, list) else [cell] for cell in cells]
    return reader.line_num - sum(text.count("\n") for some in lists for text in some if text)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a JSONL file that are not empty, by their number, each as its value, or the ValueError or
    RecursionError that reading it ended in. One by one, for a file may be larger than the memory.

    A line ends in a line break alone, unlike those of `splitlines`, which ends one at U+2028 within a text too. The
    mark that Excel and Notepad put first is left out.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8; with where in the file.
    """
    before = 0  # bytes
    with path.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                begin, end = before + error.start, before + error.end
                raise UnicodeDecodeError(error.encoding, error.object, begin, end, error.reason) from None
            before += len(line)
            if text.strip():
                try:
                    yield number, json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield number, error


def cut_off(path: Path) -> bool:
    """Whether a WAV, AVI or AIFF file is shorter than it says, unnoticed by its readers. Streams say they are huge."""
    with path.open("rb") as file:
        order = {b"RIFF": "little", b"FORM": "big"}.get(file.read(4))
        size = file.read(4)
    # some writers count the 8 bytes read here, too
    return order is not None and path.stat().st_size < int.from_bytes(size, order) < 0x7F00_0000  # type: ignore[arg-type]


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of the operating system's, or of a full disk, met while writing `path` into one sentence.

    Raises:
        InputError: the disk is full, the folder is read-only, a parent is missing, …
    """
    try:
        yield
    except Exception as error:
        if disk_full(error) and not isinstance(error, EquipoiseError):
            raise InputError(
                f"{path}: the disk is full (or a quota or file size limit is reached); nothing half-written was left. "
                "Free some space, and start again, or resume what had begun; or choose another place with runs=FOLDER."
            ) from error
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written: {error.strerror or error}.") from error
        raise


def version(file: Path) -> tuple[int, ...]:
    """What is another once a file was written anew, or one of its name took its place; empty where there is none."""
    try:
        about = file.stat()
    except OSError:
        return ()
    return about.st_ino, about.st_mtime_ns, about.st_size


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Replace `path` by `data`: readers see the old file or the new one, also after a crash or on a full disk.

    Raises:
        InputError: the file cannot be written; the old one, if any, is untouched.
    """
    path = Path(path)
    with explained(path):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with open(temporary, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append(path: Path, line: str) -> None:
    """Add a whole line to `path`, or nothing of it.

    Raises:
        InputError: the file cannot be written.
    """
    data = line.encode()
    with explained(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(handle).st_size
            if os.write(handle, data) != len(data):  # the disk filled up in the middle of the line
                os.ftruncate(handle, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)
