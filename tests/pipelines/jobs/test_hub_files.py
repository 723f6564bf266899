"""LoRA files of the hub: references, the hub's cache, and a stand-in for the hub itself."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from equipoise.errors import InputError
from equipoise.pipelines.jobs import hub_files, making

CODE = "import sys; from equipoise.pipelines.jobs import hub_files as h; print(h.fetch(sys.argv[1]))"


class Files(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download takes, of a repository with one file."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        there = self.path == "/somebody/vase/resolve/main/weights/vase.safetensors"
        body = b"the weights" if there else b"{}"
        self.send_response(200 if there else 404)
        for name, value in {"Content-Length": str(len(body)), "ETag": '"abc"', "X-Repo-Commit": "c" * 40}.items():
            self.send_header(name, value)
        if not there:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture
def fetch(tmp_path: Path):
    """Fetches a reference in a process of its own, from such a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        server.daemon_threads, server.asked = True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        more = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
        environment = {**os.environ, **more, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}

        def ask(reference: str) -> subprocess.CompletedProcess:
            command = [sys.executable, "-c", CODE, reference]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

        ask.server = server
        yield ask
        server.shutdown()


def test_a_file_is_downloaded_once_and_known_by_its_repository(fetch):
    first = fetch("hub:somebody/vase/weights/vase.safetensors")
    file = Path(first.stdout.strip().splitlines()[-1])
    assert file.read_bytes() == b"the weights" and hub_files.repository_of(file) == "somebody/vase", first.stderr
    asked = len(fetch.server.asked)
    again = fetch("hub:somebody/vase/weights/vase.safetensors")
    assert again.stdout == first.stdout and len(fetch.server.asked) == asked, "it is there already"
    assert next(making._names(file)) == "somebody/vase"
    missing = fetch("hub:somebody/vase")
    assert "somebody/vase: the hub gave no pytorch_lora_weights.safetensors" in missing.stderr


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "vase",
        "../vase",
        "a/../b",
        "a/b/c",
        "a/b/../x.safetensors",
        "a/b/x.pkl",
        "http://a/b",
        "/a/b",
        "a/b\n",
        "-a/b",
    ],
)
def test_what_is_no_reference_is_refused_before_anything_is_asked(reference):
    for words in (reference, f"hub:{reference}"):
        with pytest.raises(InputError, match="is written OWNER/NAME"):
            hub_files.parse(words)


def test_what_a_reference_names():
    assert hub_files.parse("a/b") == ("a/b", "pytorch_lora_weights.safetensors")
    assert hub_files.parse("hub:a.c/b-1/sub/my file.safetensors") == ("a.c/b-1", "sub/my file.safetensors")
    assert hub_files.repository_of(Path("/srv/lora.safetensors")) == ""
