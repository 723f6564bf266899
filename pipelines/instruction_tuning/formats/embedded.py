"""Media that are inside of a file of conversations: written once, by their content, to where all readers find them."""

import atexit
import base64
import binascii
import hashlib
import io
import os
import re
import secrets
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from equipoise.errors import InputError
from equipoise.pipelines.files import explained

BY_URL = "names media by URL, and nothing is downloaded"
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.IGNORECASE)
_ENDINGS = {"jpeg": "jpg", "x-wav": "wav", "mpeg": "mp3", "svg+xml": "svg"}


class MediaFolder:
    """Where such media are kept. A name is the digest of what is in it, and no name of the file's own."""

    def __init__(self, folder: Path | None = None):  # None: one that goes when the process ends
        self._folder = folder

    def path(self, given: Any) -> Any:
        """The path of one of a record's media; what names none is given back, for the reader to say so.

        Raises:
            InputError: it is no base64, or at an address of the network.
        """
        if isinstance(given, dict):
            if given.get("bytes") is not None:
                return self.path_of(given["bytes"], Path(str(given.get("path") or "")).suffix[1:])
            if data := given.get("data") or given.get("base64"):  # OpenAI's sounds, and Anthropic's sources
                kind = str(given.get("format") or given.get("media_type") or "").rpartition("/")[2].lower()
                return self.of_base64(data, _ENDINGS.get(kind, kind))
            named = given.get("url") or given.get("path")
            return self._of_text(named) if isinstance(named, str) else given
        if isinstance(given, bytes):
            return self.path_of(given)
        if isinstance(given, str):
            return self._of_text(given)
        if hasattr(given, "save") and hasattr(given, "mode"):  # a picture of Pillow's, as `datasets` decodes them
            written = io.BytesIO()
            given.save(written, "PNG")
            return self.path_of(written.getvalue(), "png")
        return given

    def path_of(self, content: Any, ending: str = "") -> str:
        """The path of a file with this content.

        Raises:
            InputError: it is no content, or cannot be written.
        """
        if not isinstance(content, bytes):
            raise InputError(f"has a medium whose bytes are {type(content).__name__}.")
        ending = ending.lower() if re.fullmatch(r"[A-Za-z0-9]{1,5}", ending) else "bin"
        name = f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.{ending}"
        path = (self._folder or _passing()) / name[:2] / name
        if not path.is_file() or path.stat().st_size != len(content):
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{name}.{secrets.token_hex(4)}")
                try:
                    temporary.write_bytes(content)
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
        return os.path.abspath(path)

    def of_base64(self, text: Any, ending: str = "") -> str:
        """
        Raises:
            InputError: it is no base64.
        """
        try:
            return self.path_of(base64.b64decode("".join(str(text).split()), validate=True), ending)
        except (binascii.Error, ValueError):
            raise InputError(f"has a medium that is no base64 ({str(text)[:30]!r}…).") from None

    def _of_text(self, text: str) -> str:
        kind = text[:8].lower()
        if kind.startswith("data:") and (head := _DATA.match(text)):
            ending = (head[1] or "").rpartition("/")[2].lower()
            ending = _ENDINGS.get(ending, ending)
            return self.of_base64(text[head.end() :] if head[3] else text, ending)
        if kind.startswith(("http://", "https://")):
            raise InputError(f"{BY_URL} ({text[:60]}). Download it, and name the file.")
        return url2pathname(urlsplit(text).path) if kind.startswith("file:///") else text


def is_passing(path: Path) -> bool:
    """Whether a file goes with this process."""
    return bool(_passing.cache_info().currsize) and path.is_relative_to(_passing())


@cache
def _passing() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="equipoise-media-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
