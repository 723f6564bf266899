"""Programs in processes of their own that need not import torch first."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Protocol

import pytest

# Forks for each line that it reads. The child then does what Python does after its start, and ends as it would.
FORKING = """
import gc, json, os, runpy, sys
import accelerate, torch, torch._dynamo
gc.freeze()  # else the child's first look for garbage copies all of that

for line in sys.stdin:
    asked = json.loads(line)
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    raise SystemExit
os.chdir(asked["folder"])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, file in ((1, asked["out"]), (2, asked["err"])):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
first, *words = asked["words"]
if first == "-m":
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
else:
    sys.argv, sys.path[0] = asked["words"], os.path.dirname(os.path.realpath(first))
    runpy.run_path(first, run_name="__main__")
"""


class Python(Protocol):
    """Runs what `python WORDS` would in the folder, and gives what it printed and its exit code."""

    def __call__(self, folder: Path, *words: str) -> CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def forked() -> Iterator[Python]:
    """Python with torch imported already, which is two thirds of the time of a small program."""
    command = [sys.executable, "-c", FORKING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(folder: Path, *words: str) -> CompletedProcess[str]:
            out, err = folder / "out.txt", folder / "err.txt"
            asked = {"folder": str(folder), "out": str(out), "err": str(err), "words": words}
            print(json.dumps(asked), file=server.stdin, flush=True)
            return CompletedProcess(words, int(server.stdout.readline()), out.read_text(), err.read_text())

        yield run


@pytest.fixture(scope="session")
def started() -> Python:
    """Python from its very start."""

    def run(folder: Path, *words: str) -> CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder)

    return run
