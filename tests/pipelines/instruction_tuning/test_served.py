"""Answers by a server that speaks OpenAI's protocol: those that the run's own model gives, judged alike."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMultimodalLM, AutoProcessor

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.data import conversation
from equipoise.pipelines.instruction_tuning.evaluate import answer
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store

NAME = "instruction_tuning/demo"


class Handler(BaseHTTPRequestHandler):
    """What of the protocol is asked for; messages are read by the reader of data in that format."""

    server: "Served"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
        if self.server.refuses:
            return self.reply({"error": {"message": self.server.refuses, "code": 400}}, 400)
        with self.server.turn:
            record = {"messages": [*body["messages"], {"role": "assistant", "content": "?"}]}
            example = conversation(record, Path())
            samples = config.load(NAME, [f"samples.max_new_tokens={body['max_tokens']}"]).samples
            (found,) = answer(self.server.model, self.server.talk, [example], samples)
        message = {"role": "assistant", "content": found.text}
        return self.reply({"object": "chat.completion", "choices": [{"index": 0, "message": message}]})

    def reply(self, document: dict, code: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Served(ThreadingHTTPServer):
    """Has the model of a folder that a run exported."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForMultimodalLM.from_pretrained(folder)
        self.talk = Talk(AutoProcessor.from_pretrained(folder), self.model.config.model_type)
        self.names, self.refuses, self.asked, self.turn = ["tuned"], "", [], threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture
def trained(short):
    def get(kind: str, data: Path) -> Run:
        words = [*short(kind, data), "learning_rate=1e-2", "schedule=constant", "samples.max_new_tokens=6"]
        settings = config.load(NAME, [w for w in words if w != "samples.max_new_tokens=2"])
        run = Store(settings.runs).create(settings)
        assert execute(InstructionTuning, settings, run).state == "done"
        return run

    return get


@pytest.fixture
def served(tmp_path) -> Iterator[Any]:
    begun: list[Served] = []

    def start(run: Run) -> Served:
        assert main(["export", str(run.folder), "--format", "merged", "--output", str(tmp_path / run.id)]) == 0
        begun.append(Served(tmp_path / run.id))
        threading.Thread(target=begun[-1].serve_forever, daemon=True).start()
        return begun[-1]

    yield start
    for server in begun:
        server.shutdown()
        server.server_close()


def score(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("score: "))


@pytest.mark.parametrize(("kind", "data"), [("llava", "pictures"), ("qwen2_audio", "sounds")])
def test_a_server_is_judged_as_the_model_in_this_process(kind, data, trained, served, request, tmp_path, capsys):
    file = request.getfixturevalue(data)
    server = served(run := trained(kind, file))
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), str(file), "--output", str(tmp_path / "own.jsonl")]) == 0
    own = capsys.readouterr().out
    words = ["evaluate", str(run.folder), str(file), "--server", server.url]
    assert main([*words, "--output", str(tmp_path / "served.jsonl")]) == 0
    found = capsys.readouterr().out
    assert score(found) == score(own) and "loss: " in own and "loss: " not in found
    assert (tmp_path / "served.jsonl").read_text() == (tmp_path / "own.jsonl").read_text()
    assert {(one["model"], one["temperature"], one["max_tokens"]) for one in server.asked} == {("tuned", 0, 6)}
    assert all(one["path"] == "/v1/chat/completions" and one["key"] is None for one in server.asked)


def test_predict_names_a_model_and_sends_a_key(trained, served, pictures, monkeypatch, capsys):
    server = served(run := trained("llava", pictures))
    server.names = ["base", "tuned"]
    picture = str(pictures.parent / "0.png")
    capsys.readouterr()
    assert main(["predict", str(run.folder), picture, "--prompt", "What colour?", "--server", server.url]) == 2
    assert capsys.readouterr().err.strip().endswith(f"has base, tuned. Name one: {server.url}#NAME.")
    monkeypatch.setenv("EQUIPOISE_SERVER_KEY", "secret")
    words = ["predict", str(run.folder), picture, "--prompt", "What colour?"]
    assert main([*words, "--server", f"{server.url}#base"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == "What colour?"
    (asked,) = server.asked
    assert (asked["model"], asked["key"]) == ("base", "Bearer secret")
    assert [part["type"] for part in asked["messages"][0]["content"]] == ["image_url", "text"]


def test_a_server_that_refuses_or_is_not_there_is_reported(trained, served, pictures, place, capsys):
    server = served(run := trained("llava", pictures))
    server.refuses = "the context is too short."
    words = ["evaluate", str(run.folder), str(pictures), "--server"]
    capsys.readouterr()
    assert main([*words, server.url]) == 2
    assert "talk.jsonl:1: " in (told := capsys.readouterr().err) and "refuses (400): the context is too short." in told
    server.names = []
    assert main([*words, server.url]) == 2 and "has no models" in capsys.readouterr().err
    assert main([*words, "http://127.0.0.1:9/v1"]) == 2
    assert "does not answer" in (told := capsys.readouterr().err) and "Is it running?" in told
    for url in ("localhost:8000", "http://[bad"):
        assert main([*words, url]) == 2 and "is no URL" in capsys.readouterr().err
    assert main(["train", "vase.yaml", "--id", "counted", "--runs", str(run.root)]) == 0
    assert main(["evaluate", "counted", str(pictures), "--server", server.url, "--runs", str(run.root)]) == 2
    assert "--server: the pipeline counting does not read it." in capsys.readouterr().err
