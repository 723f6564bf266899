"""What the page costs with many runs in the folder: its first paint, and the server's time for a refresh.

    python benchmarks/ui_load.py                 # 300 runs, and a browser if one is installed
    python benchmarks/ui_load.py --runs 1000 --queued 100 --finishing 10
    python benchmarks/ui_load.py --runs 1 --steps 1000000

The runs are copies of one that was written by the run's own functions, with --steps records of metrics each; beside
them is a sweep of 25 such cells, of 2000 records at most, with its comparison. Times are medians, the server's of
processor time, which says the same on a busy machine; a refresh is what the tab Runs asks for every two seconds. With
--finishing another process takes so many runs a second from a queue of --queued, begins, ends and replaces them
meanwhile.
"""

import argparse
import itertools
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from select import select
from typing import Any

from PIL import Image

from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import Cell, Comparison, Picture
from equipoise.pipelines.comparing.report import write_report
from equipoise.pipelines.jobs import background
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store
from equipoise.ui.quick import import_gradio

import_gradio()

from equipoise.ui import compare, compare_grid, compare_numbers, launch, launch_estimates, runs, runs_detail  # noqa: E402  gradio is imported in its own way first
from equipoise.ui.safety import Site  # noqa: E402

BROWSER = ["--headless", "--no-sandbox", "--disable-gpu"]
AXES = {
    "optimizer": ["adamw", "scaled_adamw", "bounded_adamw", "ada_sam", "alpha_adam"],
    "learning_rate": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
}


def fill(run: Run, steps: int) -> Run:
    """Trains a run without training."""
    with run.session(signals=False):
        run.update(total=steps)
        with open(run.folder / "metrics.jsonl", "w") as file:
            for i in range(1, steps):
                file.write(f'{{"step": {i}, "time": {3e9 + i}, "loss": {1 / i}, "rate": 0.001, "kappa": 0.5}}\n')
        run.metric(steps, loss=1 / steps, rate=1e-3, kappa=0.5)
        folder = run.samples / f"step-{steps:08d}"
        folder.mkdir()
        for index in range(8):
            Image.new("RGB", (64, 64), (10 * index, 0, 0)).save(folder / f"{index:02d}-0.png")
        run.finish("done", f"{steps} steps.", steps)
    return run


def store(root: Path, count: int, steps: int) -> Site:
    """A runs folder with so many runs, and a sweep."""
    site = Site(Store(root))
    config = configs.load("text_to_image/demo", [f"runs={root}"])
    one = fill(site.store.create(configs.set_keys(config, {"sweep": {}}), id="one"), steps)
    for index in range(count - 1):
        shutil.copytree(one.folder, root / f"old-{index:04d}")
    made = sweeps.create(configs.set_keys(config, {"sweep": AXES}), id="grid")
    for cell in sweeps.cells(made):
        fill(cell, min(steps, 2000))
    made.update(state="done")
    compared(made)
    return site


def compared(made: Run) -> None:
    """A comparison of a sweep's cells, six prompts each, whose pictures are their samples."""
    folder = made.folder / "comparison"
    folder.mkdir()
    cells = [Cell("", "base", math.nan, 0, "done"), *(Cell(run.id, "", 0, 0, "done") for run in sweeps.cells(made))]
    places = itertools.product(AXES["optimizer"], AXES["learning_rate"])
    for cell, (row, rate) in zip(cells[1:], places, strict=True):
        cell.row, cell.rate = str(row), float(rate)
    for index, cell in enumerate(cells):
        cell.metrics["score"] = index / len(cells)
        for prompt in range(6):
            name = f"{index}-{prompt}.png"
            Image.new("RGB", (64, 64), (9 * index, 40 * prompt, 0)).save(folder / name)
            cell.pictures.append(Picture(prompt, 0, name, name, scores={"score": index / len(cells)}))
    prompts = [f"prompt {index}" for index in range(6)]
    write_report(Comparison(made.id, folder, prompts, "score", cells[0], cells[1:]))


def busy(root: Path, queued: int, rate: float) -> None:
    """In a process of its own: so many runs wait, and so many a second are taken, end, and are followed by others."""
    made, finished, begun = Store(root), 0, time.monotonic()
    config = configs.load("text_to_image/demo", [f"runs={root}"])
    for _ in range(queued):
        made.enqueue(made.create(config))
    print("ready", flush=True)
    while not select([sys.stdin], [], [], 0)[0]:  # until the other end is closed
        run = made.claim()
        assert run is not None
        with run.session(signals=False):
            run.metric(1, loss=1.0)
            run.finish("done", "1 step.", 1)
        made.enqueue(made.create(config))
        finished += 1
        time.sleep(max(0.0, begun + finished / rate - time.monotonic()))
    print(f"{finished / (time.monotonic() - begun):.1f}", flush=True)


def most_memory() -> float:
    """MiB, the most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def seconds(work: Callable[[], Any], times: int) -> tuple[float, float]:
    """Of processor time: the first time, and the median of those after it."""
    taken = []
    for _ in range(times + 1):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return taken[0], statistics.median(taken[1:])


def painted(root: Path, times: int) -> list[float] | None:
    """Seconds from asking for the page until its table of runs is there, in a fresh browser's tab each time."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        return None
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "equipoise.pipelines.cli", "ui", "--port=0", f"--runs={root}"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        sync_playwright() as playwright,
    ):
        assert server.stdout is not None
        url = server.stdout.readline().split(",")[0].rpartition(" ")[2]
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER)
        taken = []
        for _ in range(times):
            context = browser.new_context()
            page = context.new_page()
            started = time.perf_counter()
            page.goto(url)
            page.get_by_role("tab", name="Runs").wait_for()
            painting = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
            first = page.evaluate(painting)
            whole = time.perf_counter() - started
            page.get_by_role("tab", name="Runs").click()
            page.locator("#runs-table tbody tr").nth(100).wait_for()
            taken.append((first, whole, time.perf_counter() - started))
            context.close()
        browser.close()
        server.terminate()
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="runs in the folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="records of metrics of each (default: %(default)s)")
    parser.add_argument("--queued", type=int, default=100, help="runs that wait then (default: %(default)s)")
    parser.add_argument("--finishing", type=float, default=0, help="runs that end each second (default: %(default)s)")
    parser.add_argument("--busy", help=argparse.SUPPRESS)  # the runs folder, in the process that ends runs
    parser.add_argument("--no-browser", action="store_true", help="the server's times alone")
    parser.add_argument("--times", type=int, default=5, help="repetitions (default: %(default)s)")
    args = parser.parse_args()
    if args.busy:
        return busy(Path(args.busy), args.queued, args.finishing)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder, "runs").resolve()
        site = store(root, args.runs, args.steps)
        now = site.store.create(configs.load("text_to_image/demo", [f"runs={root}"]), id="now")  # at work all along
        stack.enter_context(now.session(signals=False))
        now.update(total=2 * args.steps, step=args.steps)
        shutil.copy(root / "one" / "metrics.jsonl", now.folder)
        waiting = site.store.create(configs.load("text_to_image/demo", [f"runs={root}"]), id="waiting")
        made = launch.Plan(config := site.store.get("one").config(), [config], "")
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {args.runs} runs of {args.steps} steps\n")
        if args.finishing:
            command = [sys.executable, __file__, f"--busy={root}", f"--queued={args.queued}"]
            command.append(f"--finishing={args.finishing}")
            other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(other)
            assert other.stdin and other.stdout
            other.stdout.readline()
        kind = f"{args.runs:,} runs"
        if args.finishing:
            kind += f", {args.queued} more wait, {args.finishing:g} end each second"
        print(f"| | {kind} |\n| --- | ---: |")
        before = most_memory()
        for name, work in {
            "the table of runs": lambda: runs.table(site),
            "the table and a run at work: curves, samples, log, files": lambda: (
                runs.table(site),
                runs_detail.detail(site, "now", None),
            ),
            "the table and a sweep of 25 cells": lambda: (runs.table(site), runs_detail.detail(site, "grid", None)),
            "a queued process's look at whether it is its turn": lambda: background.ahead(waiting),
            "the estimate of time": lambda: launch_estimates.estimate(site, made, 1),
            "the list, as `equipoise runs` has it": lambda: site.store.list(),
            "the comparisons to choose from": lambda: compare.choices(site),
            "a comparison of 25 cells and six prompts: grid, curve, table": lambda: (
                compare_grid.grid(site, "grid/comparison"),
                compare_numbers.curve(site, "grid/comparison"),
                compare_numbers.table(site, "grid/comparison"),
            ),
        }.items():
            first, then = seconds(work, args.times)
            print(f"| {name} | {1000 * then:.0f} ms ({1000 * first:.0f}) |", flush=True)
        if not args.no_browser and (found := painted(root, args.times)):
            first, whole, table = found
            print(f"| first paint | {first:.2f} s |\n| the tabs can be used | {whole:.2f} s |")
            print(f"| the table of runs is there | {table:.2f} s |\n")
        print(f"{most_memory() - before:.0f} MiB more memory at most than before the first of these")
        if args.finishing:
            said, _ = other.communicate()  # which closes its standard input
            print(f"{args.queued} waited, and {said.strip()} ended each second meanwhile")


if __name__ == "__main__":
    main()
