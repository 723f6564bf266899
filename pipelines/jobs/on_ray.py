"""A sweep's cells as tasks of a Ray cluster (https://docs.ray.io): the executor, and what a task does.

Tasks get text: the folder of a cell, on a disk that all nodes share, or the URL of its copy. What they answer is a
sentence on what that folder cannot tell. Nodes need Equipoise, of this version, and what the configuration names.
"""

import logging
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from equipoise import __version__, registry
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.jobs import checks, storage
from equipoise.pipelines.jobs.executors import GRACE, Where, dead
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs import environment
from equipoise.pipelines.runs.run import Run, sentence
from equipoise.pipelines.runs.status import Status

_PLACE = "equipoise-cell-"  # and a task's process, and more: its folder, where it has none of the sweep's
_PATIENCE = 5.0  # seconds that an address has to answer


class OnRay:
    """Each cell that waits is a task, which the cluster begins when a node has what it asks for."""

    def __init__(self, where: Where):
        """Connects to the cluster, or starts a Ray on this machine where there is none.

        Raises:
            InputError: Ray is not installed, nobody answers at the address, or the storage cannot be used.
        """
        try:
            import ray  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError as error:
            raise InputError(
                f"--executor ray: Ray cannot be imported ({error}). `pip install 'equipoise[ray]'` brings it."
            ) from error
        if where.storage:
            storage.check(where.storage)
        self.ray: Any = ray
        self.at_once = where.max_parallel
        self.copies = storage.Copies(where.storage) if where.storage else None
        with _uninterrupted():  # Ray's start does not survive it
            _connect(ray, where.address)
        cpus = 1.0 if where.cpus is None else where.cpus
        gpus = float("GPU" in ray.cluster_resources()) if where.gpus is None else where.gpus
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        have = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
        print(
            f"Ray: {len(nodes)} nodes, {have['CPU']:g} CPUs, {have['GPU']:g} GPUs; each cell asks for "
            f"{cpus:g} CPUs and {gpus:g} GPUs.",
            flush=True,
        )
        if not any(node.get("CPU", 0.0) >= cpus and node.get("GPU", 0.0) >= gpus for node in nodes):
            print("No node has as much: cells wait until one joins. --cpus and --gpus ask for less.", flush=True)
        # Without retries of Ray's own: the sweep counts them.
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(train_cell)
        self.tasks: dict[Any, Run] = {}  # reference → its cell

    @property
    def busy(self) -> bool:
        return bool(self.tasks)

    def look(self, cells: Sequence[Run]) -> dict[str, str]:
        ended = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)[0] if self.tasks else []
        if self.copies:
            self.copies.fetch(cells, self._at_work(), {self.tasks[reference].id for reference in ended})
        lost = {}
        for reference in ended:
            cell = self.tasks[reference]
            if self.copies and self.copies.waits(cell):
                continue
            del self.tasks[reference]
            try:
                said = self.ray.get(reference) or (self.copies.given_up(cell) if self.copies else "")
            except self.ray.exceptions.RayTaskError as error:  # such as where a node has no Equipoise
                said = f"its task failed: {sentence(error.cause or error)}"
            except self.ray.exceptions.RayError as error:
                if cell.status().taken_out:
                    continue
                lost[cell.id] = f"the process of its task is gone ({type(error).__name__})"
                continue
            if said and not cell.status().over:
                with suppress(InputError):  # another process trains it
                    cell.update(state="failed", message=said, queued=None, ended=time.time(), exit_code=2)
                    cell.log(said)
        for reference, cell in self.tasks.items():
            if cell.status().taken_out:
                self.ray.cancel(reference)
        mine = self._at_work()
        return dead(cell for cell in cells if cell.id not in mine) | lost

    def start(self, sweep: Run, cells: Sequence[Run], now: Mapping[str, Status], retried: int) -> None:
        mine = self._at_work()
        others = sum(status.state == "running" and id not in mine for id, status in now.items())
        for cell in cells:
            if self.at_once is not None and len(self.tasks) + others >= self.at_once:
                return
            if now[cell.id].state == "queued" and cell.id not in mine:
                url = self.copies.send(cell) if self.copies else None
                if self.copies and url is None:
                    continue
                arguments = (str(cell.folder), url, storage.EVERY, __version__, platform.node())
                self.tasks[self.task.remote(*arguments)] = cell

    def end(self, patience: float) -> None:
        mine = list(self.tasks.values())
        self._await(mine, patience)
        for reference in self.tasks:
            self.ray.cancel(reference, force=True)
        self._await(mine, GRACE)

    def close(self) -> None:
        """Disconnects, which ends what is at work still; a Ray that was started here ends."""
        self.ray.shutdown()

    def _at_work(self) -> set[str]:
        return {cell.id for cell in self.tasks.values()}

    def _await(self, cells: Sequence[Run], seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.tasks and time.monotonic() < until:
            self.ray.wait(list(self.tasks), timeout=0.2)
            lost = self.look(cells)
            for cell in cells:
                if cell.id in lost:
                    message = "interrupted before its state was saved; the last checkpoint stays"
                    cell.update(state="stopped", message=message, queued=None, ended=time.time(), exit_code=130)


def train_cell(folder: str, url: str | None, every: float, version: str, host: str) -> str:
    """What a task does: trains a cell.

    Args:
        folder: The cell's, where the sweep is.
        url: Of its copy, where its folder is not to be seen from here.
        every: Seconds between two looks at the copy.
        version: Of Equipoise, where the sweep is.
        host: The name of the machine where the sweep is.

    Returns:
        What went wrong, if anything did, in a sentence.
    """
    node = platform.node()
    try:
        if version != __version__:
            raise InputError(f"has Equipoise {__version__}, and the sweep is one of {version}. Install the same one.")
        if url is None:
            if not Path(folder, "status.json").is_file():
                raise InputError(
                    f"does not see {folder}. Keep runs where all nodes see them (--runs FOLDER), or name a storage "
                    "that all reach (--storage URL)."
                )
            _train(Run(folder), checked=node == host)
            return ""
        _sweep_up()
        with tempfile.TemporaryDirectory(prefix=f"{_PLACE}{os.getpid()}-", ignore_cleanup_errors=True) as place:
            here = Path(place, *Path(folder).parts[-3:])  # RUNS/SWEEP/CELL
            copy = storage.Copy(here, url)
            if not copy.pull():
                raise InputError(f"finds no cell at {url}.")
            with copy.kept(every):
                _train(Run(here), checked=node == host)
        return ""
    except EquipoiseError as error:
        return f"{node}: {sentence(error)}"


def _sweep_up() -> None:
    """Removes the folders of tasks on this node that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PLACE}*-*"):
        owner = left.name.removeprefix(_PLACE).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _train(cell: Run, checked: bool) -> None:
    cell.indexed = False  # a table that several machines write breaks
    if cell.status().state in ("done", "diverged"):
        return
    with environment.there(cell.folder / "environment.json"):
        config = cell.config()
        if not checked:
            checks.check([config])
        execute(registry.load("pipelines", config.pipeline), config, cell)


def _connect(ray: Any, address: str | None) -> None:
    asked = address or os.environ.get("RAY_ADDRESS")
    if asked not in (None, "", "auto", "local"):
        _check_address(str(asked))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what will change in Ray
            # A client of a cluster (ray://) leaves the rest to the cluster.
            options = {} if "://" in str(asked) else {"include_dashboard": False, "log_to_driver": False}
            # Nodes take modules from the current folder first, and a torch.py in it is not meant.
            with chdir(sys.prefix):
                ray.init(address=address, logging_level=logging.ERROR, **options)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError, ImportError) as error:
        where = f"--address {asked}" if asked else "--executor ray"
        raise InputError(f"{where}: Ray does not begin: {sentence(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray takes it


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C within the block takes effect at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def _check_address(address: str) -> None:
    """Ray itself waits long, and its library writes pages of its log."""
    kind, _, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":")
    if kind not in ("", "ray") or not host or not port.isdigit() or int(port) > 65535:
        raise InputError(f"--address {address}: must be HOST:PORT, ray://HOST:PORT, auto or local.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except OSError as error:
        raise InputError(
            f"--address {address}: nobody answers there ({error.strerror or error}). `ray status`, on a node of the "
            "cluster, tells whether it runs."
        ) from error
