"""What a browser may reach: runs by their ids, data by the names of its roots, and nothing through links or dots."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.config import RunConfig, describe, flat
from equipoise.pipelines.config.keys import Opened
from equipoise.pipelines.config.records import HUB_ID
from equipoise.pipelines.media.pictures import decode
from equipoise.pipelines.media.reading import EnormousError, MediaError
from equipoise.pipelines.runs.store import Store

PIXELS = 50_000_000  # of one uploaded picture; a camera's has 24 million
PICTURES = 200  # files of one upload
UPLOAD = 20_000_000  # bytes of one uploaded picture, or of a form
ZIPPED = 500_000_000  # bytes of one uploaded file, such as many pictures in a zip file
SUFFIXES = {  # what is served, and as what; everything else stays where it is
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".csv": "text/csv",
    ".json": "application/json",
    ".jsonl": "text/plain",
    ".txt": "text/plain",
    ".yaml": "text/plain",
    ".md": "text/plain",
    ".html": "text/html",
    ".safetensors": "application/octet-stream",
}
LISTS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".yaml", ".safetensors")  # what a choice of data may end in
OFFERED = 500  # entries of one folder
COMMANDS = "script: this page starts no commands of other programs. `equipoise train` and `equipoise sweep` do."
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")
_UPLOADED = ("PNG", "JPEG", "WEBP")
_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp"}  # MPO: a JPEG with more pictures behind it


@dataclass(frozen=True)
class Site:
    """What one server shows."""

    store: Store
    data: Mapping[str, Path] = field(default_factory=dict)  # name → folder of data or models, resolved
    read_only: bool = False  # whether the page only shows

    def file(self, name: str) -> Path:
        """The file behind `RUN/…` or `comparisons/…`.

        Raises:
            InputError: There is none, it is of a kind that is not served, or it lies outside of the runs folder.
        """
        parts = name.split("/")
        if len(parts) > 1 and all(_PART.fullmatch(part) for part in parts):
            target = (self.store.root / name).resolve()
            if parts[0] == "comparisons" and len(parts) == 2:  # which say where files lie
                raise InputError(f"{name[:200]!r}: there is no such file.")
            if target.is_relative_to(self.store.root) and target.suffix in SUFFIXES and target.is_file():
                return target
        raise InputError(f"{name[:200]!r}: there is no such file.")

    def without_paths(self, error: Exception) -> str:
        """An error's message, without where on this machine the runs lie."""
        return str(error).replace(f"{self.store.root}: ", "").replace(f"{self.store.root}{os.sep}", "")

    def may_read(self, path: Path) -> bool:
        """Whether it leads into the runs folder or a data root."""
        return _inside(path, [self.store.root.resolve(), *self.data.values()])

    def choices(self, at: str = "") -> list[tuple[str, str]]:
        """What was uploaded, and folders and files of the data roots as `NAME/…`: (words, choice).

        Args:
            at: what is chosen now. Of its root, the way back up is offered, and what lies there; of others the top.
        """
        uploads = sorted((self.store.root / "uploads").glob("*"), reverse=True)
        found = [(f"uploads/{one.name}", str(one)) for one in uploads if one.is_dir() and not one.is_symlink()]
        for name in self.data:
            parts = self._folder(at if at.partition("/")[0] == name else name).split("/")
            found += [(f"{folder}/", folder) for folder in ("/".join(parts[: n + 1]) for n in range(len(parts)))]
            found += self._below("/".join(parts))
        return found

    def _folder(self, choice: str) -> str:
        """The folder that a choice `NAME/…` is or lies in."""
        while "/" in choice:
            try:
                if ".." not in choice and os.path.isdir(self.path(choice)):
                    return choice.rstrip("/")
            except InputError:  # out of its root
                pass
            choice = choice.rpartition("/")[0]
        return choice

    def _below(self, folder: str) -> list[tuple[str, str]]:
        """The folders in a folder, and the files that list examples or hold weights."""
        root = self.data[folder.partition("/")[0]]
        try:
            here = [(not os.path.isdir(item), item.name) for item in os.scandir(self.path(folder))]
        except OSError:  # it may be gone, or not for us
            return []
        some = sorted(one for one in here if one[1][0] != "." and (not one[0] or one[1].endswith(LISTS)))
        able = [one for one in some[:OFFERED] if _inside(Path(self.path(folder), one[1]), [root])]
        found = [(f"{folder}/{name}{'' if is_file else '/'}", f"{folder}/{name}") for is_file, name in able]
        return found + [(f"… {len(some) - OFFERED} more in {folder}: type the name", folder)] * (len(some) > OFFERED)

    def path(self, choice: str) -> str:
        """A choice `NAME/…` as the path of what it names; everything else as it is.

        Raises:
            InputError: It leads out of its root.
        """
        name, _, rest = choice.partition("/")
        if name not in self.data or "\0" in rest:
            return choice
        target = self.data[name] / rest
        if not _inside(target, [self.data[name]]):
            raise InputError(f"{choice}: leads out of {name}, the folder that this page may read.")
        return str(target.resolve())

    def problems(self, *configs: RunConfig) -> list[str]:
        """Paths in configurations that lead out of the data roots, folders with links that do, and commands of other
        programs: a sentence for each.

        Args:
            configs: One, or a sweep's and those of its cells.
        """
        roots = [self.store.root, *self.data.values()]
        hint = f"one of {', '.join(self.data)}" if self.data else "--data NAME=FOLDER when it starts"
        found = [COMMANDS] if any(getattr(one, "script", None) for one in configs) else []
        marked = {key.key: key.opened for one in configs[:1] for key in describe(type(one))}
        for key, text in dict.fromkeys(item for one in configs for item in _paths(one, marked)):
            if not _inside(Path(text), roots):
                found.append(f"{key}: {text[:200]!r} is not in a folder that this page may read; give {hint}.")
            elif link := _way_out(_folder(text), roots):
                found.append(
                    f"{key}: {link} is a link that leads out of the folders that this page may read; remove it."
                )
        return found


def refuse_commands(config: RunConfig) -> None:
    """Raises InputError where a configuration, or a cell of its sweep, starts another program's command."""
    axes = {config.SHORT.get(key, key): values for key, values in config.sweep.items()}
    if any([getattr(config, "script", None), *axes.get("script", ())]):
        raise InputError(COMMANDS)


def _paths(config: RunConfig, marked: Mapping[str, Opened | None]) -> Iterator[tuple[str, str]]:
    """What in a configuration names something on this machine's disks: (key, path).

    These are the keys that their record marks as such, whatever they hold. Plugins' options and the records of other
    packages may lack marks, and count where they look like a path. The rest is words: a prompt may begin with a slash.
    Where runs are kept is the server's choice.

    Args:
        marked: the keys of its record, with the mark of those that name a file or folder.
    """
    keys = {key: mark for key, mark in marked.items() if key != "runs"}
    foreign = not type(config).__module__.startswith("equipoise.pipelines.")
    for key, value in flat(config).items():
        if mark := keys.get(key):
            for text in _texts(value):
                elsewhere = mark.hub and HUB_ID.fullmatch(text) and not os.path.lexists(text)
                if not elsewhere and not (mark.demo and text == demo.NAME):
                    yield key, text
        elif key in keys and (foreign or key.rpartition(".")[2] == "options"):
            yield from ((key, text) for text in _texts(value) if _is_path(text))


def _is_path(text: str) -> bool:
    """Whether a text may lead somewhere: it is whole, leads up or home, or something of that name is here."""
    try:
        return text.startswith(("/", "~")) or ".." in Path(text).parts or os.path.lexists(text)
    except ValueError:  # a NUL
        return True


def _folder(text: str) -> Path:
    """What a path leads into: of a pattern, the folder that its files are in."""
    path = Path(text)
    return (path.parent if "*" in path.name and not path.exists() else path).resolve()


def _way_out(folder: Path, roots: Sequence[Path]) -> Path | None:
    """A link below a folder that leads out of the roots; links to other folders in them are followed, each once."""
    waiting, visited = [folder], set()
    while waiting:
        if (next_one := waiting.pop()) in visited:
            continue
        visited.add(next_one)
        for here, folders, files in os.walk(next_one):
            for name in (*folders, *files):
                path = Path(here, name)
                if path.is_symlink():
                    if not _inside(path, roots):
                        return path
                    waiting += [path.resolve()] * path.is_dir()
    return None


def _inside(path: Path, roots: Sequence[Path]) -> bool:
    """Whether a path leads into one of the folders; one that cannot be followed leads nowhere."""
    try:
        target = path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, no such user, a NUL
        return False
    return any(target.is_relative_to(root) for root in roots)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def check_picture(path: Path, name: str) -> str:
    """Decodes an uploaded picture within bounds; returns the suffix of its format, whatever it is called.

    Raises:
        InputError: It is too large, or none.
    """
    if path.stat().st_size > UPLOAD:
        raise InputError(f"{name}: is larger than {UPLOAD // 1_000_000} MB; make it smaller.")
    try:
        return _SUFFIXES[decode(path, PIXELS, _UPLOADED).format or ""]
    except EnormousError as error:
        raise InputError(f"{name}: {error.problem}") from error
    except MediaError as error:
        raise InputError(f"{name}: is not a picture that can be read (PNG, JPEG or WebP).") from error


def read_password(file: Path | None) -> tuple[str, str] | None:
    """`name:password` from a file, or from the environment variable EQUIPOISE_UI_AUTH; None where neither is given.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    if file is None:
        text, where = os.environ.get("EQUIPOISE_UI_AUTH", ""), "EQUIPOISE_UI_AUTH"
    else:
        where = f"--auth {file}"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if file is None and not text:
        return None
    name, sign, password = text.strip().partition(":")
    if not (name and sign and len(password) >= 8):
        raise InputError(f"{where}: must hold one line NAME:PASSWORD, the password of at least 8 characters.")
    return name, password
