"""Pictures and captions out of an uploaded zip file: into the folder of uploads, bounded, and nothing else of it."""

import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from equipoise.errors import InputError
from equipoise.ui.safety import PICTURES, UPLOAD

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CAPTION = ".txt"  # beside a picture of the same name
MOST_CAPTION = 5_000  # characters
MOST_FILES = 10_000  # in one zip file, read or not
MOST_BYTES = 1_000_000_000  # of all pictures of one zip file, unpacked
_ODD = re.compile(r"[^\w.() -]")
_BROKEN = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError, ValueError)


@dataclass
class Unpacked:
    """What came out of files that were uploaded."""

    pictures: list[str] = field(default_factory=list)  # paths
    captions: dict[str, str] = field(default_factory=dict)  # by the picture's path
    left_out: list[str] = field(default_factory=list)  # a sentence each


def unpack(paths: Sequence[str], into: Path) -> Unpacked:
    """Of uploaded files the pictures, out of zip files too, and the captions of .txt files beside them.

    Args:
        paths: of the uploads.
        into: a folder of uploads; each zip file's pictures go into a new folder within it.
    """
    found = Unpacked()
    loose = {Path(path).stem: path for path in paths if path.endswith(CAPTION)}
    for path in paths:
        if path.lower().endswith(".zip"):
            _open(Path(path), into, found)
        elif not path.endswith(CAPTION):
            found.pictures.append(path)
            if text := loose.get(Path(path).stem):
                found.captions[path] = _words(Path(text).read_bytes()[: 4 * MOST_CAPTION])
    return found


def _open(path: Path, into: Path, found: Unpacked) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            if len(archive.infolist()) > MOST_FILES:
                raise InputError(f"{path.name}: has more than {MOST_FILES} files.")
            _take(path.name, archive, Path(tempfile.mkdtemp(dir=into)), found)
    except InputError as error:
        found.left_out.append(str(error))
    except _BROKEN:
        found.left_out.append(f"{path.name}: is no zip file that can be read.")


def _take(name: str, archive: zipfile.ZipFile, folder: Path, found: Unpacked) -> None:
    """Raises InputError where the pictures are too many or too large in all."""
    texts = {info.filename.removesuffix(CAPTION): info for info in archive.infolist() if _is_text(info)}
    size = 0
    for number, info in enumerate(sorted(archive.infolist(), key=lambda one: one.filename)):
        inside = PurePosixPath(info.filename.replace("\\", "/"))
        if info.is_dir() or inside.suffix.lower() not in SUFFIXES or _hidden(inside):
            continue
        if problem := _problem(info, inside):
            found.left_out.append(f"{name}: {info.filename[:80]!r} {problem}. It was left out.")
            continue
        if len(found.pictures) == PICTURES:
            raise InputError(f"{name}: has more than {PICTURES} pictures; the first {PICTURES} were taken.")
        try:
            data = _read(archive, info, UPLOAD)
        except _BROKEN:
            found.left_out.append(f"{name}: {info.filename[:80]!r} cannot be read. It was left out.")
            continue
        if (size := size + len(data)) > MOST_BYTES:
            raise InputError(f"{name}: its pictures have more than {MOST_BYTES // 1_000_000} MB in all.")
        kept = folder / f"{number:05d}" / _ODD.sub("_", inside.name)[-80:]
        kept.parent.mkdir()
        kept.write_bytes(data)
        found.pictures.append(str(kept))
        if text := texts.get(info.filename.removesuffix(inside.suffix)):
            found.captions[str(kept)] = _caption(archive, text)


def _problem(info: zipfile.ZipInfo, inside: PurePosixPath) -> str:
    """Why an entry is not taken; nothing is ever written where its name says."""
    if inside.is_absolute() or ".." in inside.parts or ":" in inside.parts[0]:
        return "leads out of the file"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link"
    if info.flag_bits & 1:
        return "is encrypted"
    return f"is larger than {UPLOAD // 1_000_000} MB" if info.file_size > UPLOAD else ""


def _hidden(inside: PurePosixPath) -> bool:
    """What programs add for themselves, such as macOS's copies of every name."""
    return any(part.startswith((".", "__MACOSX")) and part != ".." for part in inside.parts)


def _is_text(info: zipfile.ZipInfo) -> bool:
    return info.filename.endswith(CAPTION) and not stat.S_ISLNK(info.external_attr >> 16) and not info.flag_bits & 1


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    """An entry's bytes. Raises ValueError where they are more than that, whatever the file says of itself."""
    with archive.open(info) as opened:
        data = opened.read(most + 1)
    if len(data) > most:
        raise ValueError
    return data


def _caption(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    try:
        return _words(_read(archive, info, 4 * MOST_CAPTION))
    except _BROKEN:
        return ""


def _words(data: bytes) -> str:
    return " ".join(data.decode("utf-8-sig", errors="replace").split())[:MOST_CAPTION]
