"""Answers by a server that speaks OpenAI's protocol, as vLLM's does, in place of `generate` in this process.

The server has the model's own template and processor; it is sent conversations with their media, and no tokens.
"""

import base64
import io
import json
import os
import urllib.error
import urllib.request
import wave
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.config import InstructionTuningSamples
from equipoise.pipelines.instruction_tuning.data import Conversation
from equipoise.pipelines.instruction_tuning.evaluate import Answer, judged
from equipoise.pipelines.instruction_tuning.media import open_picture, open_sound
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.instruction_tuning.writing import content, template_of

KEY = "EQUIPOISE_SERVER_KEY"  # of the environment: what is sent as the key, where a server wants one
_PATIENCE = 600.0  # seconds that an answer may take


class Server:
    """A server at a URL, such as http://localhost:8000/v1; with #NAME behind it, the model of that name.

    Raises:
        InputError: it cannot be reached, or has several models and none is named.
    """

    def __init__(self, url: str):
        address, _, name = url.partition("#")
        try:
            known = urlsplit(address).scheme in ("http", "https")
        except ValueError:  # of brackets that are no IPv6 address
            known = False
        if not known:
            raise InputError(f"--server: {url} is no URL. Give one such as http://localhost:8000/v1.")
        self.url = address.rstrip("/")
        self.name = name or self._only_model()

    def answers(
        self,
        talk: Talk,
        examples: Sequence[Conversation],
        samples: InstructionTuningSamples,
        tell: Callable[[int], object] = lambda count: None,  # called with how many were just answered
    ) -> list[Answer]:
        """The answers to each conversation's last question, without sampling; `samples.batch` are asked at a time.

        Raises:
            InputError: the server refuses a conversation or does not answer, or the model has no chat template.
        """
        if not template_of(talk.processor):
            raise InputError(
                f"--server: {talk.model_type} has no chat template that a server could write by. Leave it."
            )
        found = []
        with ThreadPoolExecutor(samples.batch) as pool:
            texts = pool.map(partial(self._ask, talk, samples.max_new_tokens), examples)
            for example, text in zip(examples, texts, strict=True):
                found.append(judged(example, talk.unreasoned(example, text), samples.metric))
                tell(1)
        return found

    def _ask(self, talk: Talk, most: int, example: Conversation) -> str:
        body = {"model": self.name, "messages": messages(talk, example), "max_tokens": most, "temperature": 0}
        if "enable_thinking" in str(template_of(talk.processor)):  # answers are learnt without reasoning
            body["chat_template_kwargs"] = {"enable_thinking": False}
        reply = self._send("chat/completions", body, f"{example.where}: ")
        try:
            return reply["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise InputError(f"--server: {self.url} answers with no message: {str(reply)[:200]}.") from None

    def _only_model(self) -> str:
        reply = self._send("models", None)
        try:
            names = [model["id"] for model in reply["data"]]
        except (KeyError, TypeError):
            raise InputError(f"--server: {self.url} lists no models: {str(reply)[:200]}.") from None
        if len(names) != 1:
            raise InputError(f"--server: {self.url} has {', '.join(names) or 'no models'}. Name one: {self.url}#NAME.")
        return names[0]

    def _send(self, path: str, body: dict[str, Any] | None, what: str = "") -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise InputError(f"--server: {what}{self.url} refuses ({error.code}): {_reason(error)}.") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError(f"--server: {what}{self.url} does not answer ({reason}). Is it running?") from None


def messages(talk: Talk, example: Conversation) -> list[dict[str, Any]]:
    """A conversation up to its last answer, in OpenAI's format."""
    media = iter(example.media)
    found: list[dict[str, Any]] = [{"role": "system", "content": example.system}] if example.system else []
    for turn in example.turns:
        parts = [
            _part(talk, part["type"], next(media)) if "text" not in part else part for part in content(turn.question)
        ]
        found.append({"role": "user", "content": parts})
        found.append({"role": "assistant", "content": turn.answer})
    return found[:-1]


def _part(talk: Talk, kind: str, path: Path) -> dict[str, Any]:
    """A medium as it is trained on: a picture upright, a sound at the model's rate. Of a video the file, whose frames
    the server takes."""
    written = io.BytesIO()
    if kind == "image":
        open_picture(path).save(written, "PNG")
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_base64(written.getvalue())}"}}
    if kind == "audio":
        samples = (open_sound(path, talk.rate).clip(-1, 1) * 32767).astype(np.int16)
        with wave.open(written, "wb") as file:
            file.setparams((1, 2, talk.rate, len(samples), "NONE", ""))
            file.writeframes(samples.tobytes())
        return {"type": "input_audio", "input_audio": {"data": _base64(written.getvalue()), "format": "wav"}}
    ending = path.suffix[1:].lower() or "mp4"
    return {"type": "video_url", "video_url": {"url": f"data:video/{ending};base64,{_base64(path.read_bytes())}"}}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _reason(error: urllib.error.HTTPError) -> str:
    """What a server says of a refusal."""
    text = error.read(10_000).decode(errors="replace")
    try:
        said = json.loads(text)
        said = said.get("error", said)
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300].rstrip(".") or error.reason
