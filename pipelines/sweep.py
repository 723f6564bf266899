"""A sweep: one configuration, trained over the product of some keys' values.

Every combination is a run of its own (a cell) in the sweep's folder and in the queue. Worker processes take cells from
the queue until it is empty; each loads the base once. A cell that diverges or fails is recorded and the rest goes on.
"""

import itertools
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from equipoise import registry
from equipoise.errors import ConfigError, EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.pipeline import Outcome, execute
from equipoise.pipelines.records import RunConfig
from equipoise.pipelines.store import Run, Store

POLL = 0.5  # seconds between looks at the cells
_AGAIN = ("queued", "stopped", "failed", "dead")  # a restarted sweep tries these again; done and diverged are results


def expand(config: RunConfig) -> dict[str, RunConfig]:
    """Every cell's name and configuration.

    Raises:
        ConfigError: there is no axis, an axis is empty, or a combination is not valid (all such are named at once).
    """
    if not config.sweep:
        raise ConfigError(
            ["sweep: has no axes. Give some: --axis learning_rate=1e-4,1e-3, or a section `sweep` in the file."]
        )
    cells: dict[str, RunConfig] = {}
    problems: list[str] = []
    for values in itertools.product(*config.sweep.values()):
        chosen = dict(zip(config.sweep, values, strict=True))
        name = ",".join(f"{key.split('.')[-1]}={_slug(value)}" for key, value in chosen.items())
        try:
            cell = configs.set_keys(config, {**chosen, "sweep": {}}, source=f"cell {name}")
        except ConfigError as error:
            problems += error.problems
            continue
        if name in cells:
            problems.append(f"sweep: {name} comes up twice; every value of an axis must be another one.")
        cells[name] = cell
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return cells


def create(config: RunConfig, id: str | None = None) -> Run:
    """Makes the sweep's folder with all its cells queued. Everything is checked before anything is written.

    Raises:
        ConfigError: a cell's configuration or what it points to is wrong.
    """
    cells = expand(config)
    pipeline = registry.load("pipelines", config.pipeline)
    worlds = {
        repr([cell.model_dump()[key] for key in ("model", "data", "train") if hasattr(cell, key)]): cell
        for cell in cells.values()
    }
    if problems := list(dict.fromkeys(line for cell in worlds.values() for line in pipeline.check(cell))):
        raise ConfigError(problems)
    store = Store(config.runs)
    sweep = store.create(config, kind="sweep", id=id)
    for name, cell in cells.items():
        store.enqueue(store.create(cell, kind="cell", sweep=sweep.id, id=name))
    return sweep


def cells(sweep: Run) -> list[Run]:
    """The sweep's cells in the order of its axes."""
    order = {name: index for index, name in enumerate(expand(sweep.config()))}
    found = [Run(folder) for folder in sweep.folder.iterdir() if (folder / "status.json").is_file()]
    return sorted(found, key=lambda run: order.get(run.folder.name, len(order)))


def train(sweep: Run, workers: int) -> Outcome:
    """Trains what is left of a sweep, showing its progress; a stop request reaches every cell.

    Raises:
        InputError: the sweep is being trained by another process.
    """
    store = Store(sweep.root)
    with sweep.session():
        for cell in cells(sweep):
            if cell.status().state in _AGAIN:
                cell.forget_requests()
                store.enqueue(cell)
        outcome = _watch(sweep, workers)
        sweep.finish(outcome.state, outcome.message, outcome.step)
    return outcome


def _watch(sweep: Run, workers: int) -> Outcome:
    mine = cells(sweep)
    totals = {cell.id: cell.config().train.steps for cell in mine}
    total, stopping = sum(totals.values()), False
    watched = sys.stderr.isatty()  # a log file wants a line now and then
    sweep.update(total=total)
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=total,
                desc=sweep.id,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.05,
                file=sys.stderr,
                mininterval=0.1 if watched else 10,
            )
        )
        processes: list[subprocess.Popen] = []
        spawned = 0
        while True:
            now = {cell.id: cell.status() for cell in mine}
            states = Counter(status.state for status in now.values())
            finished = sum(totals[id] if s.over and s.state != "stopped" else s.step for id, s in now.items())
            bar.update(finished - bar.n)
            counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            bar.set_postfix_str(counts, refresh=watched)
            sweep.update(step=finished)
            processes = [process for process in processes if process.poll() is None]
            if "stop" in sweep.requested() and not stopping:
                stopping = True
                _stop(mine)
            if not processes and (stopping or not states["queued"]):
                break
            # A worker that died leaves the queue to a new one; a limit, in case every worker dies at once.
            while not stopping and len(processes) < min(workers, states["queued"]) and spawned < workers + len(mine):
                processes.append(_spawn(sweep, spawned % workers, workers))
                spawned += 1
            if not processes and spawned >= workers + len(mine):
                raise EquipoiseError(
                    f"{sweep.id}: the workers die as soon as they start. {sweep.folder}/workers.txt says why."
                )
            time.sleep(POLL)
    said = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return Outcome("stopped" if stopping else "done", f"{len(mine)} cells: {said}.", sum(s.step for s in now.values()))


def _stop(mine: Iterable[Run]) -> None:
    for cell in mine:
        try:
            if cell.status().state == "queued":
                cell.update(state="stopped", queued=None, message="the sweep was stopped before this cell began")
                continue
        except InputError:  # a worker has just taken it
            pass
        if cell.status().state == "running":
            cell.request("stop")


def _spawn(sweep: Run, index: int, workers: int) -> subprocess.Popen:
    """A process of its own session: the terminal's Ctrl-C reaches the sweep, and the sweep asks the cells."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if devices := _cuda_devices():
        environment["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
    with open(sweep.folder / "workers.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "equipoise.pipelines.sweep", str(sweep.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
        )


def _cuda_devices() -> list[str]:
    """The devices workers are dealt out over, without importing torch; none on a machine without CUDA."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device for device in visible.split(",") if device]
    return [str(index) for index, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]


def default_workers() -> int:
    """One per CUDA device, or one."""
    return max(1, len(_cuda_devices()))


def work(folder: str) -> None:
    """A worker: trains cells of the sweep until its queue is empty or a stop is asked for."""
    sweep = Run(folder)
    store = Store(sweep.root)
    while cell := store.claim(sweep=sweep.id):
        config = cell.config()
        try:
            outcome = execute(registry.load("pipelines", config.pipeline), config, cell)
        except EquipoiseError as error:  # recorded in the cell's folder
            print(error, file=sys.stderr, flush=True)
            continue
        if outcome.state == "stopped":
            break


def parse_axes(words: Sequence[str]) -> dict[str, list[Any]]:
    """`key=value,value,…` words as axes; values are written as in YAML, and a YAML list keeps its commas.

    Raises:
        ConfigError: a word is not of that form.
    """
    axes: dict[str, list[Any]] = {}
    problems = []
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key or not text:
            problems.append(f"--axis {word}: is not of the form key=value,value, such as learning_rate=1e-4,1e-3.")
        elif text.startswith("["):
            value = configs.parse_value(text)
            axes[key] = value if isinstance(value, list) else [value]
        else:
            axes[key] = [configs.parse_value(part) for part in text.split(",")]
    if problems:
        raise ConfigError(problems)
    return axes


def _slug(value: Any) -> str:
    """A value as part of a folder's name: a plugin with options reads scaled_adamw+damping=0.01."""
    if isinstance(value, dict):
        inner = {**value, **value.get("options", {})}
        inner.pop("options", None)
        name = inner.pop("name", "")
        return "+".join(part for part in (str(name), *(f"{k}={_slug(v)}" for k, v in inner.items())) if part)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+=-]+", "_", text)[:60] or "_"


if __name__ == "__main__":
    work(sys.argv[1])
