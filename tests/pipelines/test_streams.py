"""Terminals that lack letters, and streams that are closed, take nothing away from a run."""

import json
import os
import subprocess
import sys

import pytest

CLI = [sys.executable, "-m", "equipoise.pipelines.cli"]


@pytest.mark.parametrize(
    "words", [["--help"], ["show", "bounded_adamw"], ["train", "text_to_image/dreambooth", "--keys"]]
)
def test_a_terminal_without_an_encoding_for_it_shows_the_rest(words):
    done = subprocess.run([*CLI, *words], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"\\u" in done.stdout


def test_a_folder_with_an_accent_is_trained_in_on_such_a_terminal(place):
    words = [*CLI, "train", "vase.yaml", "steps=2", f"runs={place / 'é'}", "--id", "one"]
    done = subprocess.run(words, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "é" / "one" / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_run_whose_streams_are_closed_ends_as_any_other(place, closed):
    command = f'exec "$0" -m equipoise.pipelines.cli train vase.yaml steps=2 --runs runs --id one {closed}'
    done = subprocess.run(["bash", "-c", command, sys.executable], cwd=place)
    assert done.returncode == 0
    assert json.loads((place / "runs" / "one" / "status.json").read_text())["state"] == "done"
