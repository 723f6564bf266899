"""What a browser may reach: runs by their ids, data by the names of its roots, and nothing through links or dots."""

import base64
import hmac
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.config import Key, PluginSection, RunConfig, describe, flat
from equipoise.pipelines.keys import section_at
from equipoise.pipelines.store import Store

PIXELS = 50_000_000  # of one uploaded picture; a camera's has 24 million
PICTURES = 200  # in one upload
UPLOAD = 20_000_000  # bytes of one uploaded file
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
# keys of words that are never opened, by their last parts: a prompt may well begin with a slash, or be a folder's name
_WORDS = (
    "prompt",
    "prompts",
    "negative",
    "revision",
    "variant",
    "rules",
    "targets",
    "components",
    "frozen",
    "baselines",
)
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")
_FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


@dataclass(frozen=True)
class Site:
    """What one server shows."""

    store: Store
    data: Mapping[str, Path] = field(default_factory=dict)  # name → folder of data or models, resolved

    def file(self, name: str) -> Path:
        """The file behind `RUN/…` or `comparisons/…`.

        Raises:
            InputError: There is none, it is of a kind that is not served, or it lies outside of the runs folder.
        """
        parts = name.split("/")
        if len(parts) > 1 and all(_PART.fullmatch(part) for part in parts):
            target = (self.store.root / name).resolve()
            if target.is_relative_to(self.store.root) and target.suffix in SUFFIXES and target.is_file():
                return target
        raise InputError(f"{name[:200]!r}: there is no such file.")

    def choices(self) -> list[str]:
        """What was uploaded, and what lies in the data roots as `NAME/…`."""
        found: list[str] = []
        uploads = sorted((self.store.root / "uploads").glob("*"), reverse=True)
        found += [str(folder) for folder in uploads if folder.is_dir() and not folder.is_symlink()]
        for name, root in self.data.items():
            found.append(name)
            for item in sorted(root.glob("*"))[:200]:
                if item.name[0] != "." and _inside(item, [root]):
                    found.append(f"{name}/{item.name}")
        return found

    def place(self, choice: str) -> str:
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

    def problems(self, config: RunConfig) -> list[str]:
        """Paths in a configuration that lead out of the data roots, one sentence each."""
        roots = [self.store.root, *self.data.values()]
        found = []
        words = {key.key for key in describe(type(config)) if _is_words(type(config), key)}
        for key, value in flat(config).items():
            for text in _texts(value) if key not in words else ():
                local = os.path.isabs(text) or text.startswith("~") or ".." in Path(text).parts
                if not local and ("\0" in text or len(text) > 400 or not os.path.lexists(text)):
                    continue
                if text != "demo" and not _inside(Path(text), roots):
                    hint = f"one of {', '.join(self.data)}" if self.data else "--data NAME=FOLDER when it starts"
                    found.append(f"{key}: {text[:200]!r} is not in a folder that this page may read; give {hint}.")
        return found


def _is_words(cls: type[RunConfig], key: Key) -> bool:
    """Whether a key's value names a run, a plugin or one of a few choices, or is words that nothing opens."""
    parent, _, last = key.key.rpartition(".")
    section = section_at(cls, parent) if parent and last == "name" else None
    plugin = section is not None and issubclass(section, PluginSection)
    chosen = plugin or bool(key.choices) or "Literal" in key.type
    return chosen or key.key in ("name", "runs") or last.rpartition("_")[2] in _WORDS


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # counted here, before anything is decoded
            with Image.open(path, formats=list(_FORMATS)) as image:
                if image.width * image.height > PIXELS:
                    raise InputError(f"{name}: has {image.width} × {image.height} pixels; make it smaller.")
                image.load()
                return _FORMATS[image.format or ""]
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: has far too many pixels; make it smaller.") from error
    except (OSError, SyntaxError, ValueError) as error:
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


class Guard:
    """Stands before every route: the password, and no requests that another site made a browser send."""

    def __init__(self, app: Any, auth: tuple[str, str] | None, hosts: frozenset[str]):
        """`hosts` are the names by which this server is reached; an empty set takes any."""
        self.app, self.hosts = app, hosts
        self.wanted = base64.b64encode(":".join(auth).encode()) if auth else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (answer := self._refusal(scope)):
            status, words = answer
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            if status == 401:
                headers.append((b"www-authenticate", b'Basic realm="Equipoise", charset="UTF-8"'))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": words.encode()})
        elif scope["type"] == "websocket":  # nothing here uses one
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        try:
            name, sender = urlsplit(f"//{host}").hostname or "", urlsplit(origin).netloc
        except ValueError:
            return 400, "Host or Origin is no address."
        if self.hosts and name not in self.hosts:
            return 403, "This server answers by another name."  # a name that was made to point here
        if origin and sender != host:
            return 403, "Requests from other sites are refused."
        if self.wanted is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not (hmac.compare_digest(given.strip(), self.wanted) and scheme.lower() == b"basic"):
                return 401, "A name and a password are needed."
        return None
