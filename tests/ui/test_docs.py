"""What docs/ui.md says of a notebook and of a container, as it is written there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx

DOCS = Path(__file__).parents[2] / "docs" / "ui.md"


def test_the_page_is_started_from_a_notebook(tmp_path, monkeypatch):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "Popen" in block]
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    within = {"print": said.append}
    exec(code, within)
    page = within["page"]
    try:
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+", said[0])
        assert "Equipoise" in httpx.get(url, timeout=60).text
        framed = httpx.get(url, timeout=60).headers
        assert framed["x-frame-options"] == "DENY", "so that a notebook shows no frame"
    finally:
        page.terminate()
        page.communicate(timeout=30)


def test_a_container_is_reached_by_any_name_and_by_nobody_without_the_password(tmp_path):
    """The command within the container, at a port of its own."""
    text = DOCS.read_text().split("## In a container")[1]
    (inside,) = re.findall(r"exec (equipoise ui [^\"]*)\"", text)
    (door,) = re.findall(r"-e (EQUIPOISE_UI_AUTH)=", text)
    assert re.search(r"-p 127\.0\.0\.1:7860:7860", text), "it is published on this machine alone"
    words = [word.replace("/app/runs", str(tmp_path / "runs")) for word in shlex.split(inside)[1:]]
    command = [sys.executable, "-m", "equipoise.pipelines.cli", *words, "--port=0"]
    environment = {key: value for key, value in os.environ.items() if key != door}
    shut = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert shut.returncode and "everybody who reaches this machine could start runs" in shut.stderr
    environment[door] = "me:correct horse"
    page = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert page.stdout is not None
        (port,) = re.findall(r"http://0\.0\.0\.0:(\d+)", page.stdout.readline())
        url, named = f"http://127.0.0.1:{port}/config", {"host": "the-host.example:7860"}
        assert httpx.get(url, timeout=60).status_code == 401
        assert httpx.get(url, headers=named, auth=("me", "wrong horse"), timeout=60).status_code == 401
        assert httpx.get(url, headers=named, auth=("me", "correct horse"), timeout=60).status_code == 200
        elsewhere = {**named, "origin": "http://evil.example"}
        sent = httpx.post(url, headers=elsewhere, auth=("me", "correct horse"), timeout=60)
        assert sent.status_code == 403
    finally:
        page.terminate()
        page.communicate(timeout=30)
