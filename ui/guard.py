"""What stands before every route of the page: who may ask, for what, and that files are none but those uploaded.

Gradio copies and then serves any file that a record names (`{"path": …, "meta": {"_type": "gradio.FileData"}}`),
wherever in a request the record is. So one passes only in an input for files, and only of a file that was uploaded.
"""

import asyncio
import base64
import hmac
import json
import os
import re
import stat
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from equipoise.ui.safety import PICTURES, UPLOAD

ROOM = 1_000_000_000  # bytes of uploads that wait to be used, and of one request
EXPORTS = "exports"  # in the folder of uploads: what was made here to be downloaded, which takes none of their room
WAIT = 3600  # seconds for which they are kept
_LITTLE = 1_000_000  # bytes of a request that is refused
_WORD = "[A-Za-z0-9_]+"
# The routes that the page and gradio_client need. Gradio has more, and later versions may have others still.
_READ = re.compile(
    r"/|/(?:config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|login_check)/?"
    r"|/(?:assets|static|svelte|runs-file)/.*"
    r"|/gradio_api/(?:info|app_id|login_check|startup-events|theme\.css|queue/data|queue/status|upload_progress"
    rf"|heartbeat/{_WORD}|call/{_WORD}/{_WORD})/?",
    re.DOTALL,
)
_SENT = re.compile(rf"/gradio_api/(?:(?:call|call/v2|run|api)/{_WORD}|queue/join|cancel|reset|upload)/?")
_FILE = "/gradio_api/file="
_META = {"_type": "gradio.FileData"}
_OF_A_FILE = frozenset({"path", "url", "orig_name", "is_stream", "_type"})  # keys of what gradio may take for a record
_REFUSED = "Files are uploaded, where the page asks for them; they are not fetched from addresses or from elsewhere."


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
            elif file.relative_to(folder).parts[0] != EXPORTS:
                kept += about.st_size
        except OSError:  # another request has just removed it
            continue
    return kept


class Guard:
    """Stands before every route: the password, no requests from other sites' pages, no files but those uploaded."""

    def __init__(
        self,
        app: Any,
        auth: tuple[str, str] | None,
        hosts: frozenset[str] = frozenset(),
        uploads: Path | None = None,
        takes_files: Mapping[int, Collection[int]] | None = None,
    ):
        """
        Args:
            hosts: the names by which this server is reached; an empty set takes any.
            uploads: the folder that gradio puts uploads into; without one, no file is taken.
            takes_files: an event's number → which of its inputs, counted from 0, are of files.
        """
        self.app, self.hosts, self.takes_files = app, hosts, takes_files or {}
        self.uploads = uploads.resolve() if uploads else None
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
            await _read_up(scope, receive)
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
        """Hands on what a form sends, written again, so that gradio reads exactly what was looked at here."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            sent = json.loads(body)
            if not self._is_free_of_files(sent, _event(scope, sent)):
                await _answer(send, 400, _REFUSED)
                return
            body = json.dumps(sent).encode()
        except (ValueError, RecursionError):  # or a text that no encoding holds
            await _answer(send, 400, "A form is sent as JSON.")
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        headers = [*others, (b"content-length", str(len(body)).encode())]
        await self.app({**scope, "headers": headers}, again, send)

    def _is_free_of_files(self, sent: Any, event: int | None) -> bool:
        """Whether a form names no files but uploaded ones, in those inputs of the event that are for files.

        Everything but their paths is dropped.
        """
        indices = self.takes_files.get(event, ()) if event is not None else ()
        if not (indices and isinstance(data := sent.get("data"), list)):
            return not _names_a_file(sent)
        sent["event_data"] = None  # in which the browser repeats what was chosen
        rest = {**sent, "data": [value for index, value in enumerate(data) if index not in indices]}
        return not _names_a_file(rest) and all(
            not _names_a_file(value) or all(map(self._is_uploaded, value if isinstance(value, list) else [value]))
            for value in (data[index] for index in indices if index < len(data))
        )

    def _is_uploaded(self, record: Any) -> bool:
        """Whether gradio's record is of a plain file in the folder of uploads; then that is all it goes on saying."""
        if not isinstance(record, dict) or record.get("meta") != _META or record.get("is_stream"):
            return False
        path, name = record.get("path"), record.get("orig_name")
        if not (isinstance(path, str) and self.holds(path)):
            return False
        record.clear()
        record |= {"path": path, "orig_name": os.path.basename(name) if isinstance(name, str) else None, "meta": _META}
        return True

    def holds(self, path: str) -> bool:
        """Whether a path is that of a plain file in the folder of uploads."""
        try:
            file = Path(path)
            plain = self.uploads is not None and file.is_absolute() and not file.is_symlink() and file.is_file()
            return plain and file.resolve().is_relative_to(self.uploads)  # type: ignore[arg-type]
        except (OSError, ValueError, RuntimeError):  # longer than a path can be, a NUL, links in a circle
            return False

    async def _upload(self, scope: Any, receive: Any, send: Any) -> None:
        """Hands files on until they are too many, which shows in how often the line between two of them comes."""
        headers = dict(scope["headers"])
        mark = b"--" + headers.get(b"content-type", b"").partition(b"boundary=")[2].strip(b'" ')
        count, rest, refused = 0, b"", False

        async def counted() -> Any:
            nonlocal count, rest, refused
            message = await receive()
            body = rest + message.get("body", b"")
            count += body.count(mark)
            rest = body[len(body) - len(mark) + 1 :] if len(body) >= len(mark) else body
            refused = refused or count > PICTURES + 1
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
        if scope["method"] == "POST":
            known = _SENT.fullmatch(scope["path"])
        elif scope["path"].startswith(_FILE):
            known = self.holds(scope["path"].removeprefix(_FILE))
        else:
            known = scope["method"] in ("GET", "HEAD") and _READ.fullmatch(scope["path"])
        if not known:
            return 404, "There is nothing here."
        if scope["method"] == "POST":
            length = headers.get(b"content-length", b"")
            if not length.isdigit() or b"transfer-encoding" in headers:
                return 411, "The request must state its length."
            if _is_upload(scope) and not self.takes_files:
                return 403, "Nothing is uploaded here."
            if not _is_upload(scope):
                return (413, "That is too much for a form.") if int(length) > UPLOAD else None
            if int(length) + (make_room(self.uploads) if self.uploads else 0) > ROOM:
                return 413, "More was uploaded than is kept before it is used. Try again in an hour, or with less."
        return None


def _event(scope: Any, sent: Any) -> int | None:
    """The number of the page's event that a form is sent to; None where gradio goes by a name."""
    event = sent.get("fn_index") if isinstance(sent, dict) else None
    return event if type(event) is int and scope["path"].rstrip("/") == "/gradio_api/queue/join" else None


def _names_a_file(sent: Any) -> bool:
    """Whether anything in JSON is a record of a file, or may be taken for one."""
    waiting = [sent]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if not _OF_A_FILE.isdisjoint(value):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _is_upload(scope: Any) -> bool:
    return scope["method"] == "POST" and scope["path"].rstrip("/") == "/gradio_api/upload"


_NOT_FRAMED = [(b"x-frame-options", b"DENY"), (b"content-security-policy", b"frame-ancestors 'none'")]


async def _read_up(scope: Any, receive: Any) -> None:
    """Takes what a refused request sends, if it is little: else the connection breaks before the answer is read."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    more = length.isdigit() and int(length) <= _LITTLE
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)


async def _answer(send: Any, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="Equipoise", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
