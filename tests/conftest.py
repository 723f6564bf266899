"""Fixtures for every test."""

import atexit
import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import site
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and the processes they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests come first: those tests are the long ones, and at the end nobody should wait for one alone."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


def pytest_collection_finish() -> None:
    """What was imported so far stays: it need not be searched again for garbage, nor for modules that own a factor."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.freeze)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run; tests that never import torch do not pay for it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


class Forked:
    """`python WORDS` in a process of its own, but for the start: see `tests/forking.py`."""

    def __init__(self, folder: Path, *modules: str, python: Path | str = sys.executable, **environment: str):
        self.folder, self.count = folder, 0
        command = [python, Path(__file__).with_name("forking.py"), *modules]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True, **pipes)

    def ask(self, **what: object) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(what), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(self, folder: Path, *words: str, **environment: str) -> "Started":
        """Starts it in a folder."""
        self.count += 1
        out, err = (self.folder / f"{self.count}.{kind}" for kind in ("out", "err"))
        pid = self.ask(folder=str(folder), words=words, environment=environment, out=str(out), err=str(err))
        return Started(self, pid, words, out, err)

    def __call__(self, folder: Path, *words: str, **environment: str) -> CompletedProcess[str]:
        return self.start(folder, *words, **environment)()

    def end(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)  # with programs that a failed test did not wait for
        self.server.communicate()


@dataclass(frozen=True)
class Started:
    """A program that `Forked` has started."""

    by: Forked
    pid: int
    words: tuple[str, ...]
    out: Path
    err: Path

    def __call__(self) -> CompletedProcess[str]:
        """Waits for its end; gives its exit code and what it printed."""
        return CompletedProcess(self.words, self.by.ask(wait=self.pid), self.out.read_text(), self.err.read_text())


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """For programs of which it does not matter how they start, which takes longer than all the rest of a small one."""
    forked = Forked(tmp_path_factory.mktemp("forked"))
    yield forked
    forked.end()


@pytest.fixture(scope="session")
def forked_type() -> type[Forked]:
    """For those that start from more modules, or with another Python."""
    return Forked


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """Calls a function in two fresh processes at once, with a rank and what is given, and gives what the two return."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # they meet wherever the machine's own name leads

    def call(function: Callable, *arguments) -> list:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "accelerate"])  # once for all tests that do this
        pool = ProcessPoolExecutor(2, context, take_over, [dict(os.environ)])
        try:
            started = [pool.submit(function, rank, *arguments) for rank in (0, 1)]
            return [one.result(timeout=240) for one in started]
        finally:
            for child in multiprocessing.active_children():  # when one fails, the other waits for it
                child.kill()
            pool.shutdown()

    return call


def take_over(environment: dict[str, str]) -> None:
    """Has a process that was forked long after its parent's start know of what has changed since."""
    os.environ.update(environment)


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Installs a distribution on this process's path and its children's, as its dist-info and modules alone.

    Called as `distribution("name", {"equipoise.optimizers": {"entry": "module:Class"}}, module="its source")`; returns
    the folder that holds it.
    """
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where plugins' errors are kept

    def install(name: str, groups: dict[str, dict[str, str]], version: str = "1.0", **modules: str) -> Path:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for module, source in modules.items():
            (folder / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        return folder

    return install


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser's path; `.ci/run` installs one, and elsewhere the tests that need it are skipped."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no Chromium is installed")
    return found


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a fresh virtual environment of the given wheels and this one's dependencies, and returns its python.

    `editable` says whether this environment's editable installs show through too, Equipoise among them.
    """
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def make(*wheels: Path, editable: bool) -> Path:
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = folder / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", *wheels]
        subprocess.run(pip, check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        # A path in a .pth file is searched, but the .pth files in it, which make installs editable, are not read.
        line = "import site; site.addsitedir({!r})" if editable else "{}"
        (packages / "dependencies.pth").write_text("\n".join(line.format(path) for path in site.getsitepackages()))
        return python

    return make
