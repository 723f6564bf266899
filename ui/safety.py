"""What a browser may reach: runs by their ids, data by the names of its roots, and nothing through links or dots."""

import asyncio
import base64
import hmac
import json
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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
PICTURES = 200  # files of one upload
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
LISTS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".yaml", ".safetensors")  # what a choice of data may end in
OFFERED = 500  # entries of one folder
ROOM = 1_000_000_000  # bytes of uploads that wait to be used, and of one request
WAIT = 3600  # seconds for which they are kept
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")
_ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+:")  # longer than the letter of a drive
_FETCHED = re.compile(r"/(file|proxy)=\s*[A-Za-z][A-Za-z0-9+.-]+:", re.DOTALL)  # what gradio would fetch and hand on
_CLOSED = ("/openapi.json", "/dev/reload")  # routes of gradio's that the page does not need
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

    def told(self, error: Exception) -> str:
        """What an error says, without where on this machine the runs lie."""
        return str(error).replace(f"{self.store.root}: ", "").replace(f"{self.store.root}{os.sep}", "")

    def choices(self, at: str = "") -> list[tuple[str, str]]:
        """What was uploaded, and folders and files of the data roots as `NAME/…`: (words, choice).

        Args:
            at: what is chosen now. Of its root, the way back up is offered, and what lies there; of others the top.
        """
        uploads = sorted((self.store.root / "uploads").glob("*"), reverse=True)
        found = [(f"uploads/{one.name}", str(one)) for one in uploads if one.is_dir() and not one.is_symlink()]
        for name in self.data:
            parts = self._folder(at if at.partition("/")[0] == name else name).split("/")
            found += [(f"{place}/", place) for place in ("/".join(parts[: n + 1]) for n in range(len(parts)))]
            found += self._below("/".join(parts))
        return found

    def _folder(self, choice: str) -> str:
        """The folder that a choice `NAME/…` is or lies in."""
        while "/" in choice:
            try:
                if ".." not in choice and os.path.isdir(self.place(choice)):
                    return choice.rstrip("/")
            except InputError:  # out of its root
                pass
            choice = choice.rpartition("/")[0]
        return choice

    def _below(self, folder: str) -> list[tuple[str, str]]:
        """The folders in a folder, and the files that list examples or hold weights."""
        root = self.data[folder.partition("/")[0]]
        try:
            here = [(not os.path.isdir(item), item.name) for item in os.scandir(self.place(folder))]
        except OSError:  # it may be gone, or not for us
            return []
        some = sorted(one for one in here if one[1][0] != "." and (not one[0] or one[1].endswith(LISTS)))
        able = [one for one in some[:OFFERED] if _inside(Path(self.place(folder), one[1]), [root])]
        found = [(f"{folder}/{name}{'' if is_file else '/'}", f"{folder}/{name}") for is_file, name in able]
        return found + [(f"… {len(some) - OFFERED} more in {folder}: type the name", folder)] * (len(some) > OFFERED)

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

    def problems(self, *configs: RunConfig) -> list[str]:
        """Paths in configurations that lead out of the data roots, and folders with links that do; a sentence each."""
        roots = [self.store.root, *self.data.values()]
        hint = f"one of {', '.join(self.data)}" if self.data else "--data NAME=FOLDER when it starts"
        found = []
        for key, text in dict.fromkeys(place for config in configs for place in _places(config)):
            if not _inside(Path(text), roots):
                found.append(f"{key}: {text[:200]!r} is not in a folder that this page may read; give {hint}.")
            elif link := _way_out(Path(text).expanduser().resolve(), roots):
                found.append(
                    f"{key}: {link} is a link that leads out of the folders that this page may read; remove it."
                )
        return found


def _places(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What in a configuration names something on this machine's disks: (key, path)."""
    words = {key.key for key in describe(type(config)) if _is_words(type(config), key)}
    for key, value in flat(config).items():
        for text in _texts(value) if key not in words else ():
            local = os.path.isabs(text) or text.startswith("~") or ".." in Path(text).parts
            if text != "demo" and (local or ("\0" not in text and len(text) <= 400 and os.path.lexists(text))):
                yield key, text


def _way_out(folder: Path, roots: Sequence[Path]) -> Path | None:
    """A link below a folder that leads out of the roots; links to other folders in them are followed, each once."""
    waiting, seen = [folder], set()
    while waiting:
        if (place := waiting.pop()) in seen:
            continue
        seen.add(place)
        for here, folders, files in os.walk(place):
            for name in (*folders, *files):
                path = Path(here, name)
                if path.is_symlink():
                    if not _inside(path, roots):
                        return path
                    waiting += [path.resolve()] * path.is_dir()
    return None


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


def make_room(folder: Path, age: float = WAIT) -> int:
    """Removes what was uploaded so long ago that nobody will use it; returns how many bytes are left."""
    kept = 0
    for file in folder.rglob("*"):
        try:
            about = file.lstat()
            if not stat.S_ISREG(about.st_mode):
                continue
            if time.time() - about.st_ctime > age and file.suffix != ".yaml":  # those were made here, to be saved
                file.unlink()
            else:
                kept += about.st_size
        except OSError:  # another request has just removed it
            continue
    return kept


class Guard:
    """Stands before every route: the password, no requests from other sites' pages, no floods of files."""

    def __init__(
        self, app: Any, auth: tuple[str, str] | None, hosts: frozenset[str] = frozenset(), uploads: Path | None = None
    ):
        """`hosts` are the names by which this server is reached; an empty set takes any. Files go to `uploads`."""
        self.app, self.hosts, self.uploads = app, hosts, uploads
        self.wanted = base64.b64encode(":".join(auth).encode()) if auth else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def framed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_NOT_FRAMED]}
            await send(message)

        if scope["type"] == "websocket":  # nothing here uses one
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif answer := self._refusal(scope):
            await _answer(framed, *answer)
        elif _is_upload(scope):
            await self._upload(scope, receive, framed)
        elif scope["method"] == "POST":
            await self._form(scope, receive, framed)
        else:
            try:
                await self.app(scope, receive, framed)
            except asyncio.CancelledError:  # the server ends while a page listens to its events: no error to be logged
                with suppress(RuntimeError):
                    await send({"type": "http.response.body"})

    async def _form(self, scope: Any, receive: Any, send: Any) -> None:
        """Hands on what a form sends, unless it names a file by an address, which gradio would fetch."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if _fetches(body):
            await _answer(send, 400, "Files are uploaded; they are not fetched from addresses.")
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, again, send)

    async def _upload(self, scope: Any, receive: Any, send: Any) -> None:
        """Hands files on until they are too many, which shows in how often the line between two of them comes."""
        headers = dict(scope["headers"])
        mark = b"--" + headers.get(b"content-type", b"").partition(b"boundary=")[2].strip(b'" ')
        seen, rest, refused = 0, b"", False

        async def counted() -> Any:
            nonlocal seen, rest, refused
            message = await receive()
            body = rest + message.get("body", b"")
            seen, rest = seen + body.count(mark), body[len(body) - len(mark) + 1 :] if len(body) >= len(mark) else body
            refused = refused or seen > PICTURES + 1
            return {"type": "http.disconnect"} if refused else message

        async def sent(message: Any) -> None:
            if not refused:
                await send(message)

        try:
            await self.app(scope, counted, sent)
        except Exception:
            if not refused:
                raise
        if refused:
            await _answer(send, 413, f"At most {PICTURES} files at a time.")

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
        closed = scope["path"].rstrip("/").endswith(_CLOSED) or _FETCHED.search(scope["path"])
        if closed and not scope["path"].startswith("/runs-file/"):
            return 404, "There is nothing here."
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                return 411, "How long a request is must be said beforehand."
            if not _is_upload(scope):
                return (413, "That is too much for a form.") if int(length) > UPLOAD else None
            if int(length) + (make_room(self.uploads) if self.uploads else 0) > ROOM:
                return 413, "More was uploaded than is kept before it is used. Try again in an hour, or with less."
        return None


def _fetches(body: bytes) -> bool:
    """Whether JSON holds a file whose path is an address."""
    try:
        waiting = [json.loads(body)]
    except ValueError:  # which the routes refuse themselves
        return False
    except RecursionError:
        return True
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(path := value.get("path"), str) and _ADDRESS.match(path):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _is_upload(scope: Any) -> bool:
    return scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload")


_NOT_FRAMED = [(b"x-frame-options", b"DENY"), (b"content-security-policy", b"frame-ancestors 'none'")]


async def _answer(send: Any, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="Equipoise", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
