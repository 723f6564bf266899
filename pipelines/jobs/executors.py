"""Where a sweep's cells are trained: in processes of this machine, or, in `jobs.on_ray`, on a cluster.

A sweep asks its executor again and again to start what waits and to look what became of it; what a cell has come to is
read from its folder, whoever trains it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import psutil

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.status import Status

NAMES = ("local", "ray")
GRACE = 4.0  # seconds that a process has after being interrupted, before it is killed
_FILE = "executor.json"  # in a sweep's folder
# of numbers that are asked for: kinds, least, most
_BOUNDS = (
    ("max_parallel", int, 1, 10_000),
    ("retries", int, 0, 1_000_000),
    ("cpus", int | float, 0, 1_000_000),
    ("gpus", int | float, 0, 1_000_000),
)


@dataclass(frozen=True)
class Where:
    """What is asked of the executor; a sweep is continued with the same."""

    executor: str = "local"
    address: str | None = None  # of the cluster
    max_parallel: int | None = None  # cells in work at once; None: what there are devices for
    retries: int = 2  # of a cell whose process is lost
    cpus: float | None = None  # of each cell
    gpus: float | None = None
    storage: str | None = None  # an fsspec URL that cells travel through; None: all see the runs folder
    compare: bool = True  # what came out, in the end

    def problem(self) -> str:
        """What is wrong with it, in a sentence; empty where nothing is."""
        if self.executor not in NAMES:
            return f"--executor: must be {' or '.join(NAMES)}, got {self.executor!r}."
        for name, kinds, least, most in _BOUNDS:
            value = getattr(self, name)
            if value is None and name != "retries":
                continue
            if value is None or isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
                return f"--{name.replace('_', '-')}: must be a number from {least} to {most}, got {str(value)[:40]}."
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            return f"--gpus: a cell has a share of one GPU, or whole ones, got {self.gpus:g}."
        if not isinstance(self.compare, bool):
            return f"--no-compare: must be true or false, got {str(self.compare)[:40]}."
        for name in ("address", "storage"):
            if not isinstance(getattr(self, name), str | None):
                return f"--{name}: must be text, got {str(getattr(self, name))[:40]}."
        return ""

    def remember(self, sweep: Run) -> None:
        """Lets `remembered` find this."""
        write_atomic(sweep.folder / _FILE, json.dumps(asdict(self), indent=2))


def remembered(sweep: Run) -> Where:
    """What a sweep was trained with last.

    Raises:
        InputError: Its file says what nobody can have asked for.
    """
    try:
        said = json.loads((sweep.folder / _FILE).read_bytes())
        where = Where(**{it.name: said[it.name] for it in fields(Where) if it.name in said})
    except (OSError, ValueError, TypeError, RecursionError):
        return Where()
    if problem := where.problem():
        raise InputError(f"{sweep.folder / _FILE}: {problem} Remove that file, and the usual is taken.")
    return where


class Executor(Protocol):
    """Trains cells. Only the process that watches the sweep asks."""

    @property
    def busy(self) -> bool:
        """Whether anything of it is at work still."""
        ...

    def look(self, cells: Sequence[Run]) -> dict[str, str]:
        """Brings the cells' folders up to date.

        Returns the ids of those whose process has ended without a word, each with what is known of it, once or more.
        """
        ...

    def start(self, sweep: Run, cells: Sequence[Run], now: Mapping[str, Status], retried: int) -> None:
        """Has cells trained that wait, as many as there is room for.

        Args:
            sweep: theirs.
            cells: all of its cells.
            now: how they stand.
            retried: how many cells were given back to the queue so far.

        Raises:
            EquipoiseError: there is no hope that they ever will be.
        """
        ...

    def end(self, patience: float) -> None:
        """Ends what is at work, which was asked to stop, after `patience` seconds."""
        ...


class Local:
    """Worker processes on this machine. Each takes cells from the sweep's queue until it is empty, and loads the base
    once; each has a device, or several, or a share of one."""

    def __init__(self, where: Where):
        self.devices, self.cpus = _shares(where.gpus), where.cpus
        self.at_once: int = where.max_parallel or max(1, len(self.devices))
        self.workers: list[subprocess.Popen | None] = [None] * self.at_once
        self.started = 0

    @property
    def busy(self) -> bool:
        return any(self._alive())

    def look(self, cells: Sequence[Run]) -> dict[str, str]:
        return dead(cells)

    def start(self, sweep: Run, cells: Sequence[Run], now: Mapping[str, Status], retried: int) -> None:
        alive = self._alive()
        mine = {worker.pid for worker in alive}
        running = [status.pid for status in now.values() if status.state == "running"]
        # Workers of an earlier session that was killed are at work beside ours, and count.
        others = {pid for pid in running if pid not in mine}
        queued = sum(status.state == "queued" for status in now.values())
        wanted = min(self.at_once - len(others), queued + len(running) - len(others)) if queued else 0
        # A worker that died leaves the queue to a new one; a limit, in case every worker dies at once.
        limit = self.at_once + len(cells) + retried
        for place, worker in enumerate(self.workers):
            if len(alive) < wanted and self.started < limit and (worker is None or worker.poll() is not None):
                alive.append(self._spawn(sweep, place))
                self.workers[place] = alive[-1]
                self.started += 1
        if queued and not alive and not others and self.started >= limit:
            raise EquipoiseError(
                f"{sweep.id}: the workers die as soon as they start. {sweep.folder}/workers.txt says why."
            )

    def end(self, patience: float) -> None:
        end_processes([worker.pid for worker in self._alive()], patience)

    def _alive(self) -> list[subprocess.Popen]:
        return [worker for worker in self.workers if worker is not None and worker.poll() is None]

    def _spawn(self, sweep: Run, place: int) -> subprocess.Popen:
        """A process of its own session: the terminal's Ctrl-C reaches the sweep, and the sweep asks the cells."""
        threads = str(max(1, int(self.cpus or (os.cpu_count() or 1) // self.at_once)))
        environment = {**os.environ}
        if self.cpus or "OMP_NUM_THREADS" not in environment:
            environment["OMP_NUM_THREADS"] = threads
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[place % len(self.devices)]
        with open(sweep.folder / "workers.txt", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "equipoise.pipelines.jobs.sweep", str(sweep.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )


def dead(cells: Iterable[Run]) -> dict[str, str]:
    """Those of the cells whose process is no more and has not said how it ended."""
    found = {cell.id: cell.status() for cell in cells}
    return {
        id: f"process {status.pid} on {status.host} is gone" for id, status in found.items() if status.state == "dead"
    }


def end_processes(pids: Iterable[int], patience: float) -> None:
    """Ends processes: asks, after `patience` seconds interrupts, and in the end kills."""
    alive = []
    for pid in set(pids):
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


def _shares(gpus: float | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each of the cells that there are devices for; empty without any."""
    found = _cuda_devices()
    if gpus == 0:
        return [""] if found else []
    each = 1 if gpus is None else gpus
    if gpus is not None and each > len(found):
        raise InputError(f"--gpus {gpus:g}: there are {len(found)} CUDA devices on this machine.")
    if each < 1:
        return found * int(1 / each)
    size = int(each)
    return [",".join(found[first : first + size]) for first in range(0, len(found) - size + 1, size)]


def _cuda_devices() -> list[str]:
    """The devices workers are dealt out over, without importing torch; none on a machine without CUDA."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device for device in visible.split(",") if device]
    return [str(index) for index, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]
