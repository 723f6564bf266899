"""Model cards, and the hub: its real client in a process of its own, against a server that keeps what it is sent."""

import ast
import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from equipoise.pipelines.cli import main
from equipoise.pipelines.text_to_image.result import LORA_FILE

SECRET = "hf_thisIsTheSecretOfThisTest"


@pytest.fixture
def tuned(short, tmp_path) -> Path:
    words = ["data.instance_prompt=a photo of sks | object", "samples.prompts=[one thing, another]", "lora.alpha=2"]
    assert main(["train", "text_to_image/dreambooth", *short, *words, "steps=1", "--id", "one"]) == 0
    return tmp_path / "runs" / "one"


def test_the_card_says_how_it_was_made_and_shows_what_it_draws(tuned, checkpoint):
    card = ModelCard.load(tuned / "result" / "README.md")
    told = card.data.to_dict()
    assert told["library_name"] == "diffusers" and told["pipeline_tag"] == "text-to-image"
    assert {"lora", "diffusers", "stable-diffusion"} <= set(card.data.tags)
    assert card.data.instance_prompt == "a photo of sks | object"
    assert card.data.base_model is None, "a folder is nobody else's"
    for shown, prompt in zip(card.data.widget, ["one thing", "another"], strict=True):
        assert shown["text"] == prompt
        assert shown["output"]["url"].startswith("images/")
        with Image.open(tuned / "result" / shown["output"]["url"]) as picture:
            assert picture.size == (32, 32)
    assert f"`{checkpoint.name}` (Stable Diffusion), rank 4, alpha 2" in card.text and str(checkpoint) not in card.text
    for line in ("| optimizer | scaled_adamw |", "| steps | 1 |", "| pictures | 4 |", "| learning rate | 0.0001 |"):
        assert line in card.text
    assert "sks \\| object" in card.text


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that an upload takes: a repository, what goes how, large files, a commit."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_GET = do_POST

    def answer(self, body: bytes) -> None:
        server: Server = self.server
        server.asked.append((self.command, self.path.split("?")[0], self.headers.get("Authorization"), body))
        here = f"http://127.0.0.1:{server.server_port}"
        if server.refuses:
            return self.reply({"error": f"no rights for {SECRET}"}, 403)
        if self.path == "/api/repos/create":
            return self.reply({"url": f"{here}/somebody/{json.loads(body)['name']}"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            return self.reply(
                {"files": [{"path": n, "uploadMode": modes[n.endswith("s")], "shouldIgnore": False} for n in names]}
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            wanted = [(one["oid"], one["size"]) for one in json.loads(body)["objects"]]
            up = [{"oid": o, "size": s, "actions": {"upload": {"href": f"{here}/put/{o}"}}} for o, s in wanted]
            return self.reply({"transfer": "basic", "objects": up}, kind="application/vnd.git-lfs+json")
        if self.path.startswith("/put/"):
            server.large[self.path.rsplit("/")[-1]] = body
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
            return self.reply({"commitUrl": f"{here}/somebody/vase/commit/1", "commitOid": "1", "success": True})
        return self.reply({})

    def reply(self, document: dict, code: int = 200, kind: str = "application/json") -> None:
        data = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.asked: list[tuple[str, str, str | None, bytes]] = []
        self.large: dict[str, bytes] = {}  # by their SHA-256
        self.files: dict[str, bytes] = {}  # of the repository
        self.refuses = False


@pytest.fixture
def hub():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def push(hub, run: Path, *words: str):
    environment = os.environ | {
        "HF_TOKEN": SECRET,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",  # the hub's older protocol, which is plain HTTP
        "HF_HOME": str(run.parent / "hub"),
    }
    command = [sys.executable, "-m", "equipoise.pipelines.cli", "export", str(run), "--push-to-hub", "vase", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_result_goes_to_the_hub_with_its_card_and_the_token_nowhere_else(tuned, hub):
    done = push(hub, tuned, "--private", "--format", "kohya")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"http://127.0.0.1:{hub.server_port}/somebody/vase"
    created = next(json.loads(body) for _, path, _, body in hub.asked if path == "/api/repos/create")
    assert created["name"] == "vase" and (created.get("private") or created.get("visibility") == "private")
    result = tuned / "result"
    assert hub.files.keys() == {
        LORA_FILE, "README.md", "images/00-0.png", "images/01-0.png", "kohya.safetensors",
    }  # fmt: skip
    for name in (LORA_FILE, "README.md", "images/00-0.png"):
        assert hub.files[name] == (result / name).read_bytes()
    assert hashlib.sha256((result / LORA_FILE).read_bytes()).hexdigest() in hub.large
    (result / "again.safetensors").write_bytes(hub.files["kohya.safetensors"])
    assert any(name.endswith(".alpha") for name in load_file(result / "again.safetensors"))

    writes = [who for _, path, who, _ in hub.asked if path.endswith(("/create", "/preupload/main", "/commit/main"))]
    assert writes == [f"Bearer {SECRET}"] * 3
    assert SECRET not in done.stdout + done.stderr
    kept = [file for file in tuned.parent.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert kept == []


def test_what_goes_wrong_is_one_sentence_without_the_token(tuned, hub, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["export", str(tuned), "--push-to-hub", "vase"]) == 2
    assert "needs a token with write access in the environment variable HF_TOKEN" in capfd.readouterr().err
    hub.refuses = True
    done = push(hub, tuned)
    assert done.returncode == 1 and "did not take it" in done.stderr and "no rights for …" in done.stderr
    assert SECRET not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert main(["export", str(tuned)]) == 2, "neither a file nor a repository"


def test_the_cards_python_reads_whatever_a_prompt_holds(short, tmp_path):
    prompt = 'two\nlines, "quoted" \\ and \u2028 more'
    words = [f"data.instance_prompt={json.dumps(prompt)}", "samples.prompts=[]", "steps=1", "--id", "one"]
    assert main(["train", "text_to_image/dreambooth", *short, *words]) == 0
    card = (tmp_path / "runs" / "one" / "result" / "README.md").read_text()
    (call,) = [
        node
        for node in ast.walk(ast.parse(card.split("```python")[1].split("```")[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe"
    ]
    assert ast.literal_eval(call.args[0]) == prompt
