"""A sweep: one configuration, trained over the product of some keys' values.

Every combination is a run of its own (a cell) in the sweep's folder and in the queue. Worker processes take cells from
the queue until it is empty; each loads the base once. A cell that diverges or fails is recorded and the rest goes on.
"""

import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
from tqdm import tqdm

from equipoise import registry
from equipoise.errors import ConfigError, EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines import environment
from equipoise.pipelines.axes import expand
from equipoise.pipelines.comparison import RATE
from equipoise.pipelines.pipeline import Outcome, execute
from equipoise.pipelines.records import RunConfig
from equipoise.pipelines.store import Run, Store

POLL = 0.5  # seconds between looks at the cells
GRACE = 4.0  # seconds that a process has after being asked, and after being interrupted, before it is killed
_AGAIN = ("queued", "stopped", "failed", "dead")  # a restarted sweep tries these again; done and diverged are results


def create(config: RunConfig, id: str | None = None) -> Run:
    """Makes the sweep's folder with all its cells queued. Everything is checked before anything is written.

    Raises:
        ConfigError: a cell's configuration or what it points to is wrong.
    """
    cells = expand(config)
    pipeline = registry.load("pipelines", config.pipeline)
    # The world does not depend on rate and seed, and looking at it may mean decoding every picture.
    worlds = {
        repr([item for item in configs.flat(cell).items() if item[0] not in ("seed", RATE)]): cell
        for cell in cells.values()
    }
    if problems := list(dict.fromkeys(line for cell in worlds.values() for line in pipeline.check(cell))):
        raise ConfigError(problems)
    for doubt in dict.fromkeys(line for cell in worlds.values() for line in pipeline.doubts(cell)):
        print(doubt, file=sys.stderr)
    return Store(config.runs).create(config, kind="sweep", id=id, cells=cells)


def cells(sweep: Run) -> list[Run]:
    """The sweep's cells in the order of its axes."""
    order = {name: index for index, name in enumerate(expand(sweep.config()))}
    found = [Run(folder) for folder in sweep.folder.iterdir() if (folder / "status.json").is_file()]
    return sorted(found, key=lambda run: order.get(run.folder.name, len(order)))


def train(sweep: Run, workers: int) -> Outcome:
    """Trains what is left of a sweep, showing its progress; a stop request reaches every cell.

    Raises:
        InputError: the sweep is being trained by another process.
        EquipoiseError: no cell came to a result; the message says why not.
        KeyboardInterrupt: interrupted twice; the cells in work are interrupted, too.
    """
    store = Store(sweep.root)
    with sweep.session(), environment.there(sweep.folder / "environment.json"):
        for name, config in expand(sweep.config()).items():
            if not (sweep.folder / name).exists():  # deleted since
                store.create(config, kind="cell", sweep=sweep.id, id=name)
        for cell in cells(sweep):
            if cell.status().state in _AGAIN:
                with suppress(InputError):  # a worker of an earlier session, still alive, has just taken it
                    store.enqueue(cell)
                    cell.forget_requests()
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
        stack.push(lambda kind, *_: _end(mine, processes, kind))
        spawned = 0
        while True:
            now = {cell.id: cell.status() for cell in mine}
            states = Counter(status.state for status in now.values())
            finished = sum(totals[id] if s.over and s.state != "stopped" else s.step for id, s in now.items())
            bar.update(finished - bar.n)
            bar.set_postfix_str(_counted(states), refresh=watched)
            sweep.update(step=finished)
            processes[:] = [process for process in processes if process.poll() is None]
            if stopping := stopping or "stop" in sweep.requested():
                stop(mine)  # each time: a worker may have taken a cell meanwhile
            if not processes and not states["running"] and (stopping or not states["queued"]):
                break
            # Workers of an earlier session that was killed are at work beside ours, and count.
            others = {s.pid for s in now.values() if s.state == "running"} - {process.pid for process in processes}
            wanted = min(workers - len(others), states["queued"])
            # A worker that died leaves the queue to a new one; a limit, in case every worker dies at once.
            while not stopping and len(processes) < wanted and spawned < workers + len(mine):
                processes.append(_spawn(sweep, spawned % workers, workers))
                spawned += 1
            if not processes and not others and not stopping and spawned >= workers + len(mine):
                raise EquipoiseError(
                    f"{sweep.id}: the workers die as soon as they start. {sweep.folder}/workers.txt says why."
                )
            time.sleep(POLL)
    said = f"{len(mine)} cells: {_counted(states)}."
    if stopping or states["done"]:
        return Outcome("stopped" if stopping else "done", said, sum(s.step for s in now.values()))
    if states["diverged"]:
        return Outcome("diverged", said, sum(s.step for s in now.values()))
    raise EquipoiseError("\n".join([f"{sweep.id}: no cell came to a result. {said}", *troubles(mine)]))


def _counted(states: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


def troubles(mine: Iterable[Run]) -> list[str]:
    """Why cells failed: each reason once, with how many cells it is of."""
    found = [status for cell in mine if (status := cell.status()).over and status.state not in ("done", "diverged")]
    counted = Counter((status.state, status.message) for status in found)
    return [
        f"  {count} {state}: {message or 'no reason is known; the log may tell.'}"
        for (state, message), count in counted.items()
    ]


def _end(mine: Iterable[Run], processes: Iterable[subprocess.Popen], why: type[BaseException] | None) -> None:
    """However watching ends, nothing goes on training that nobody watches."""
    if why is not None:
        interrupt(mine, [process.pid for process in processes], 0.5 if why is KeyboardInterrupt else GRACE)


def interrupt(mine: Iterable[Run], pids: Iterable[int] = (), patience: float = 0.5) -> None:
    """Ends the cells in work, and other processes: asks, after `patience` seconds interrupts, and in the end kills.

    Raises:
        InputError: a cell runs on another host.
    """
    mine = list(mine)
    stop(mine)  # so that no worker takes another cell
    at_work = [status for cell in mine if (status := cell.status()).state == "running" and status.pid]
    alive = []
    for pid in {*pids, *(status.pid for status in at_work if status.host == platform.node())}:
        with suppress(psutil.NoSuchProcess):
            alive.append(psutil.Process(pid))
    try:
        for seconds in (patience, GRACE):
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            _, alive = psutil.wait_procs(alive, seconds)
    finally:  # also when this is interrupted in its turn
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, GRACE)
    if away := [f"{status.id} on {status.host}" for status in at_work if status.host != platform.node()]:
        raise InputError(f"{', '.join(away)}: cannot be interrupted from here; the request to stop is left by file.")


def stop(mine: Iterable[Run]) -> None:
    """Asks every cell in work to save and stop, and takes those that wait out of the queue."""
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


if __name__ == "__main__":
    work(sys.argv[1])
