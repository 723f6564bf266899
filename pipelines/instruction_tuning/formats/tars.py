"""WebDataset's tars: files that share a name up to its first dot are one sample. Nothing is unpacked by its name."""

import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.formats.rows import FileError, Row

LARGEST = 1 << 28  # bytes of a file in a tar
_TEXTS = {"json", "txt", "caption"}
_SOUNDS = {"wav", "flac", "mp3", "m4a", "ogg", "opus", "aac"}
_PICTURES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"}
_VIDEOS = {"mp4", "mkv", "webm", "avi", "mov"}


def tar(file: Path) -> Iterator[Row]:
    """The samples, in the order of the file."""
    key, parts = "", {}
    try:
        with tarfile.open(file, "r|*") as opened:
            for member in opened:
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if (found := f"{folder}/{stem}".lstrip("/")) != key:
                    if parts:
                        yield Row(file, f"sample {key}", _record(parts))
                    key, parts = found, {}
                parts[ending.lower()] = _content(opened, member)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        yield Row(file, f"sample {key or 1}", FileError(f"cannot be read as a tar from here on ({reason})."))
        return
    if parts:
        yield Row(file, f"sample {key}", _record(parts))


def _content(opened: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | InputError:
    if member.size > LARGEST:
        return InputError(f"{Path(member.name).name} is enormous ({member.size / 1e6:.0f} MB).")
    content = opened.extractfile(member)
    return content.read() if content else b""


def _natural(part: tuple[str, Any]) -> list[tuple[int, str]]:
    """A file's ending as what is sorted by: numbers in it as numbers, so that 10 comes after 2."""
    return [(int(text), "") if text.isdecimal() else (-1, text) for text in re.split(r"(\d+)", part[0])]


def _record(parts: dict[str, bytes | InputError]) -> Any:
    """A sample's record: its JSON, or its text as a caption, with its media."""
    record: Any = {}
    media: dict[str, list[Any]] = {}
    for ending, content in sorted(parts.items(), key=_natural):
        if isinstance(content, InputError):
            return content
        last = ending.rpartition(".")[2]
        kind = "image" if last in _PICTURES else "audio" if last in _SOUNDS else "video" if last in _VIDEOS else ""
        if kind:
            media.setdefault(kind, []).append({"bytes": content, "path": f"a.{last}"})
        elif last in _TEXTS:
            try:
                text = content.decode("utf-8-sig")
                read = json.loads(text) if last == "json" else {"caption": text.strip()}
            except (ValueError, RecursionError) as error:
                return InputError(f"its .{ending} cannot be read ({error}).")
            if not isinstance(read, dict):
                return InputError(f"its .{ending} must be an object, got {type(read).__name__}.")
            record = read | record if last != "json" else record | read
    for kind in media:  # in place of the names that they had where the tar was made
        for name in (kind, f"{kind}s"):
            record.pop(name, None)
    return record | media
