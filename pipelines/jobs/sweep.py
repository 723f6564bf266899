"""A sweep: one configuration, trained over the product of some keys' values.

Every combination is a run of its own (a cell) in the sweep's folder and in the queue. An executor has them trained, by
processes of this machine or of a cluster. A cell that diverges or fails is recorded and the rest goes on; one whose
process is lost is tried again, from its last checkpoint.
"""

import atexit
import gc
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from equipoise import registry
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.config.records import RunConfig
from equipoise.pipelines.files import version
from equipoise.pipelines.jobs import checks
from equipoise.pipelines.jobs.axes import expand
from equipoise.pipelines.jobs.epochs import in_steps
from equipoise.pipelines.jobs.executors import GRACE, Executor, Local, Where, end_processes
from equipoise.pipelines.media.reading import decoded_once
from equipoise.pipelines.pipeline import Outcome, execute
from equipoise.pipelines.progress import progress
from equipoise.pipelines.runs import environment
from equipoise.pipelines.runs.store import Run, Store

POLL = 0.5  # seconds between looks at the cells
_AGAIN = ("queued", "stopped", "failed", "dead")  # a restarted sweep tries these again; done and diverged are results


@decoded_once()
def create(config: RunConfig, id: str | None = None) -> Run:
    """Makes the sweep's folder with all its cells queued. Everything is checked before anything is written.

    Raises:
        ConfigError: a cell's configuration or what it points to is wrong.
        InputError: the pipeline does not say how many steps a run takes.
    """
    cells = expand(config)
    for cell in cells.values():
        _steps_of(cell)
    checks.check(cells.values())
    config, counted = in_steps(config)
    cells = expand(config)
    for line in [*counted, *checks.doubts(cells.values())]:
        print(line, file=sys.stderr)
    return Store(config.runs).create(config, kind="sweep", id=id, cells=cells)


def cells(sweep: Run) -> list[Run]:
    """The sweep's cells in the order of its axes."""
    file = sweep.folder / "config.yaml"
    order = _order(file, *version(file))
    found = [Run(folder) for folder in sweep.folder.iterdir() if (folder / "status.json").is_file()]
    return sorted(found, key=lambda run: order.get(run.folder.name, len(order)))


@lru_cache(64)  # checking every cell's configuration takes a second or two
def _order(file: Path, *version: int) -> dict[str, int]:
    return {name: index for index, name in enumerate(expand(configs.load(file)))}


@contextmanager
def opened(where: Where) -> Iterator[Executor]:
    """The executor that is asked for.

    Raises:
        InputError: Ray is not installed, or does not answer; there are not the devices that are asked for; ….
    """
    if where.executor == "local":
        yield Local(where)
        return
    from equipoise.pipelines.jobs.on_ray import OnRay

    executor = OnRay(where)
    try:
        yield executor
    finally:
        executor.close()


def train(sweep: Run, executor: Executor, where: Where) -> Outcome:
    """Trains what is left of a sweep, showing its progress; a stop request reaches every cell.

    Args:
        sweep: which.
        executor: who trains its cells.
        where: what was asked of the executor; it is kept for when the sweep is continued.

    Raises:
        InputError: the sweep is being trained by another process.
        EquipoiseError: no cell came to a result; the message says why not.
        KeyboardInterrupt: interrupted twice; the cells in work are interrupted, too.
    """
    store = Store(sweep.root)
    with sweep.session(), environment.there(sweep.folder / "environment.json"):
        where.remember(sweep)
        for name, config in expand(sweep.config()).items():
            if not (sweep.folder / name).exists():  # deleted since
                store.create(config, kind="cell", sweep=sweep.id, id=name)
        executor.look(cells(sweep))
        for cell in cells(sweep):
            if cell.status().state in _AGAIN:
                with suppress(InputError):  # a worker of an earlier session, still alive, has just taken it
                    store.enqueue(cell)
                    cell.forget_requests()
        outcome = _watch(sweep, executor, where.retries)
        sweep.finish(outcome.state, outcome.message, outcome.step)
    return outcome


def _steps_of(config: RunConfig) -> int:
    if config.total_steps is None:
        raise InputError(
            f"sweep: the pipeline {config.pipeline} does not say how many steps a run takes, so that no sweep could "
            "show how far it is. Its Config must be a TrainConfig, or have a property total_steps: see docs/plugins.md."
        )
    return config.total_steps


def _watch(sweep: Run, executor: Executor, retries: int) -> Outcome:
    mine = cells(sweep)
    totals = {cell.id: _steps_of(cell.config()) for cell in mine}
    total, stopping = sum(totals.values()), False
    watched = sys.stderr.isatty()  # a log file wants a line now and then
    sweep.update(total=total)
    with ExitStack() as stack:
        bar = stack.enter_context(progress(sweep.id, "step", total=total))
        stack.push(lambda kind, *_: _end(mine, executor, kind))
        lost: dict[str, str] = {}  # cells whose process is gone → what is known of that
        tries: Counter[str] = Counter()  # cell → how many of its processes were lost
        while True:
            lost |= executor.look(mine)
            for cell in [cell for cell in mine if cell.id in lost]:
                with suppress(InputError):  # a dead host's locks outlive it for a while; the next look tries again
                    left = 0 if stopping else retries - tries[cell.id]
                    _recover(cell, lost[cell.id], left, stopping)
                    tqdm.write(f"{cell.id}: {lost[cell.id]}{'; it is tried again' * (left > 0)}.", file=sys.stderr)
                    tries[cell.id] += 1
                    del lost[cell.id]
            now = {cell.id: cell.status() for cell in mine}
            states = Counter(status.state for status in now.values())
            finished = sum(totals[id] if s.over and s.state != "stopped" else s.step for id, s in now.items())
            bar.update(finished - bar.n)
            bar.set_postfix_str(_counted(states), refresh=watched)
            sweep.update(step=finished)
            if stopping := stopping or "stop" in sweep.requested():
                stop(mine)  # each time: a worker may have taken a cell meanwhile
            if not executor.busy and not lost and not states["running"] and (stopping or not states["queued"]):
                break
            if not stopping:
                executor.start(sweep, mine, now, tries.total())
            time.sleep(POLL)
    said = f"{len(mine)} cells: {_counted(states)}."
    if stopping or states["done"]:
        return Outcome("stopped" if stopping else "done", said, finished)
    if states["diverged"]:
        return Outcome("diverged", said, finished)
    raise EquipoiseError("\n".join([f"{sweep.id}: no cell came to a result. {said}", *troubles(mine)]))


def _recover(cell: Run, why: str, left: int, stopping: bool) -> None:
    """Gives a cell whose process is lost back to the queue, if it may be tried again.

    Raises:
        InputError: its lock is still held.
    """
    now = cell.status()
    if now.over and now.state != "dead":  # it had ended before its process did
        return
    if left > 0:
        Store(cell.root).enqueue(cell)
        cell.log(f"{why}; tried again, {left} time{'s' * (left > 1)} at most")
        return
    state, code = ("stopped", 143) if stopping else ("failed", 1)
    message = f"{why}; its last checkpoint stays" if stopping else f"{why}, and no retry is left"
    cell.update(state=state, message=f"{message}.", queued=None, ended=time.time(), exit_code=code)
    cell.log(message)


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


def doubts(mine: Iterable[Run]) -> list[str]:
    """Why figures of cells may not be what their configuration promises: each reason once, with how many it is of."""
    counted = Counter(doubt for cell in mine if (doubt := cell.status().doubt))
    return [f"  {count} of these cells: {doubt}" for doubt, count in counted.items()]


def _end(mine: Iterable[Run], executor: Executor, why: type[BaseException] | None) -> None:
    """However watching ends, nothing goes on training that nobody watches."""
    if why is not None:
        patience = 0.5 if why is KeyboardInterrupt else GRACE
        stop(mine)  # so that no worker takes another cell
        try:
            executor.end(patience)
        finally:
            interrupt(mine, patience)


def interrupt(mine: Iterable[Run], patience: float = 0.5) -> None:
    """Ends the cells in work: asks, after `patience` seconds interrupts, and in the end kills.

    Raises:
        InputError: a cell runs on another host.
    """
    mine = list(mine)
    stop(mine)
    at_work = [status for cell in mine if (status := cell.status()).state == "running" and status.pid]
    end_processes([status.pid for status in at_work if status.pid and status.host == platform.node()], patience)
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
    atexit.register(gc.freeze)  # as the command line does
    work(sys.argv[1])
