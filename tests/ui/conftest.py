"""Runs and comparisons made by the store's own functions, a server in a process of its own, and a browser."""

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import Cell, Comparison, Picture, lay_out
from equipoise.pipelines.comparing.report import write_report
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store
from equipoise.ui.quick import import_gradio

with warnings.catch_warnings():  # its own import warns of what its dependencies deprecate
    warnings.simplefilter("ignore")
    import_gradio()

import gradio as gr
from gradio.events import EventData
from gradio.state_holder import SessionState

from equipoise.ui.app import page
from equipoise.ui.safety import Site

BROWSER = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
RATES = (1e-4, 1e-3)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def make_site(folder: Path) -> Site:
    """An empty runs folder, and one data root with a link that leads out of it."""
    data = folder / "photos"
    (data / "cats").mkdir(parents=True)
    (data / "out").symlink_to("/etc")
    return Site(Store(folder / "runs"), {"photos": data.resolve()})


@pytest.fixture(scope="session")
def finish():
    """Trains a run without training: metrics, samples, a result and a final state, by the run's own functions."""

    def end(run: Run, state: str = "done", steps: int = 5, message: str = "5 steps.") -> Run:
        with run.session(signals=False):
            run.update(total=steps)
            for step in range(1, steps + 1):
                run.metric(step, loss=1 / step, rate=1e-3, rate_encoder=2e-3, kappa=0.5, gradient_norm=float(step))
            for step in (2, steps):
                folder = run.samples / f"step-{step:08d}"
                folder.mkdir()
                Image.new("RGB", (16, 16), (10 * step, 0, 0)).save(folder / "00-0.png")
            (run.result / "result.json").write_text("{}")
            run.finish(state, message, steps)
        return run

    return end


@pytest.fixture
def run(site: Site, finish) -> Run:
    return make_run(site, finish)


def make_run(site: Site, finish) -> Run:
    return finish(
        site.store.create(configs.load("text_to_image/demo", [f"runs={site.store.root}", "steps=5"]), id="one")
    )


@pytest.fixture(scope="module")
def site_of_all(tmp_path_factory: pytest.TempPathFactory, finish, grid: Run) -> Site:
    """For the tests of a module that leave it as it is: a runs folder with one run and one sweep."""
    site = make_site(tmp_path_factory.mktemp("site"))
    make_run(site, finish)
    copy_grid(site, grid)
    return site


@pytest.fixture
def swept(site: Site, grid: Run) -> Run:
    return copy_grid(site, grid)


def copy_grid(site: Site, grid: Run) -> Run:
    """A sweep of two optimizers at two rates that is over, with its comparison."""
    made = site.store.root / grid.id
    shutil.copytree(grid.folder, made)
    for file in made.rglob("*"):
        if file.suffix in (".yaml", ".json", ".html"):  # configurations name the folder of runs
            file.write_text(file.read_text().replace(str(grid.root), str(site.store.root)))
    return Run(made)


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory, finish) -> Run:
    site = make_site(tmp_path_factory.mktemp("grid"))
    axes = {"optimizer": ["adamw", "scaled_adamw"], "learning_rate": list(RATES)}
    config = configs.load("text_to_image/demo", [f"runs={site.store.root}", "steps=5"])
    made = sweeps.create(configs.set_keys(config, {"sweep": axes}), id="grid")
    for cell in sweeps.cells(made):
        finish(cell)
    made.update(state="done")
    folder = made.folder / "comparison"
    mine = sweeps.cells(made)

    def pictures(place: str, ink: tuple[int, int, int]) -> list[Picture]:
        (folder / "cells" / place).mkdir(parents=True)
        names = [f"cells/{place}/{prompt:02d}-0.png" for prompt in range(2)]
        for name in names:
            Image.new("RGB", (64, 64), ink).save(folder / name)
        return [Picture(index, 0, name, name, True, "<b>seen</b>") for index, name in enumerate(names)]

    base = Cell("", "base", math.nan, 0, "untouched", metrics={"score": 0.0}, pictures=pictures("base", (90, 90, 90)))
    cells = [
        Cell(cell.id, row, rate, 0, "done", "5 steps.", {"score": 0.25 * index}, config=differs)
        for index, (cell, (row, rate, differs)) in enumerate(
            zip(mine, lay_out([c.config() for c in mine]), strict=True)
        )
    ]
    for index, cell in enumerate(cells):
        cell.pictures = pictures(cell.run.rpartition("/")[2], (60 * index, 30, 90))
    write_report(Comparison("grid", folder, ["a <i>cat</i>", "a dog"], "how right it is", base, cells))
    return made


@pytest.fixture
def answered(swept: Run) -> Run:
    """The same, of a pipeline that answers questions."""
    folder = swept.folder / "comparison"
    lines = [
        {"question": "which colour?", "answer": "red", "wanted": ["red"], "score": 1.0},
        {"question": "how many?", "answer": "<two>", "wanted": ["three", "3"], "score": 0.0},
    ]
    for place in (folder / "cells").iterdir():
        (place / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for cell in sweeps.cells(swept):
        early = {"media": ["/data/a.png"], **lines[0], "answer": "blue", "score": 0.0}
        (cell.samples / "step-00000002" / "answers.jsonl").write_text(json.dumps(early) + "\n{cut off")
    return swept


@pytest.fixture
def ask(site: Site):
    """Calls a handler of the page by its name with what a browser sent: Gradio's own checks before and after it too.

    A session goes on from call to call, as an open page does; what is no input of the page (states) is None.
    """
    pages: list[tuple[gr.Blocks, SessionState]] = []
    loop = asyncio.Runner()

    async def opened() -> tuple[gr.Blocks, SessionState]:  # where no loop runs, gradio makes some that nobody closes
        blocks = page(site, 1)
        return blocks, SessionState(blocks)

    def call(name: str, *sent: Any, event: Any = None) -> list[Any]:
        if not pages:
            pages.append(loop.run(opened()))
        (blocks, state), *_ = pages
        handler = next(one for one in blocks.fns.values() if one.name == name)
        assert len(sent) == len(handler.inputs), handler.inputs
        told = EventData(handler.inputs[0], event) if event else None
        return loop.run(blocks.process_api(handler, list(sent), state=state, event_data=told))["data"]

    with loop:
        yield call


class Server:
    """`equipoise ui` in a process of its own, which can be started again at the same port."""

    def __init__(self, root: Path, *words: str, port: int = 0, **environment: str):
        self.root, self.words, self.environment, self.port = root, words, environment, port
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "equipoise.pipelines.cli", "ui", f"--port={self.port}", f"--runs={self.root}"]
        environment = {**os.environ, **self.environment}
        started = time.monotonic()
        self.process = subprocess.Popen(
            [*command, *self.words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + (self.process.stdout.read() or "")
        self.seconds = time.monotonic() - started
        self.port, self.url = int(found[1]), found[0]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=60)  # what its threads are at is finished first
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise


@pytest.fixture
def serve():
    """Starts servers, and ends them after the test."""
    with serving() as start:
        yield start


@pytest.fixture(scope="module")
def serve_all():
    """Starts servers for all tests of a module: their start takes longer than most of what is asked of them."""
    with serving() as start:
        yield start


@contextmanager
def serving() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(root: Path, *words: str, **environment: str) -> Server:
        started.append(Server(root, *words, **environment))
        return started[-1]

    yield start
    for server in started:
        server.stop()
        for item in Store(server.root).list(kinds=("run", "sweep", "cell")):  # what a failed test left at work
            if not item.over and item.pid:
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(item.pid).kill()


@pytest.fixture(scope="module")  # while it lasts, its event loop is the only one that this thread may have
def browser(chromium: str):
    """A real browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=BROWSER)


@pytest.fixture
def lines():
    """A run's metrics as they are on disk."""
    return lambda run: [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
