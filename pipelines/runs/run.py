"""One run: its folder, what is written there, and the session of the process that trains it."""

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.files import append, disk_full, write_atomic
from equipoise.pipelines.runs import environment, status
from equipoise.pipelines.runs.index import Index
from equipoise.pipelines.runs.lock import exclusive, stop_signals
from equipoise.pipelines.runs.status import HEARTBEAT, Status

if TYPE_CHECKING:
    from PIL.Image import Image

REQUESTS = ("stop", "save", "sample")
FOLDERS = ("samples", "checkpoints", "result", "requests")
_PROGRESS = {"step", "loss", "rate"}  # written with the next heartbeat; everything else at once


class Watcher(Protocol):
    """What a run reports to while it trains."""

    def begin(self, step: int) -> None:
        """Training goes on from this step; what was reported after it does not count."""
        ...

    def metrics(self, step: int, values: Mapping[str, Any]) -> None: ...

    def pictures(self, step: int, pictures: "Mapping[str, Sequence[Image]]") -> None: ...


class Run:
    """A run's folder. Anyone may read and send requests; one process at a time trains, in a `session`."""

    def __init__(self, folder: Path | str):
        """Open an existing run.

        Raises:
            InputError: the folder holds no run.
        """
        self.folder = Path(folder).resolve()
        cell = status.read(self.folder).kind == "cell"
        self.sweep = self.folder.parent.name if cell else None  # the id of the sweep that this is a cell of
        self.root = self.folder.parent.parent if cell else self.folder.parent
        self.id = self.folder.relative_to(self.root).as_posix()
        self.log_file = self.folder / "log.txt"
        self.samples, self.checkpoints, self.result, _ = (self.folder / name for name in FOLDERS)
        self.signal: int | None = None  # the signal that asked this session to stop
        self.watcher: Watcher | None = None  # what this session reports to beside the folder
        self.indexed = True  # whether changes go into the runs folder's index
        self._requests = {kind: str(self.folder / "requests" / kind) for kind in REQUESTS}
        self._stop = False
        self._live: Status | None = None  # this session's record, ahead of the file by a heartbeat
        self._lock = threading.Lock()

    # What anyone may do

    def config(self) -> Any:
        """The run's configuration."""
        return configs.load(self.folder / "config.yaml")

    @property
    def ref(self) -> str:
        """What a user types to mean this run: its id where that is enough."""
        return self.id if runs_folder() == self.root else str(self.folder)

    def status(self) -> Status:
        """How the run stands."""
        return self._live or replace(status.read(self.folder), id=self.id)

    def metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, oldest first; lines that are damaged or cut off are left out."""
        return [
            {k: float(v) if v in ("NaN", "Infinity", "-Infinity") else v for k, v in record.items()}
            for _, record in self._metric_lines()
        ]

    def request(self, kind: str) -> None:
        """Ask the process that trains this run to "stop", "save" or "sample" after its current step."""
        if kind not in REQUESTS:
            raise InputError(f"{self.id}: no request {kind!r}; there are {', '.join(REQUESTS)}.")
        write_atomic(self._requests[kind], "")

    def log(self, text: str) -> None:
        """Add a line to `log.txt`."""
        append(self.log_file, f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def update(self, **changes: Any) -> None:
        """Change the status.

        In a session, `step`, `loss` and `rate` cost nothing: they are written with the next heartbeat. Outside one the
        change is made under the run's lock.

        Raises:
            InputError: another process trains the run, or the status cannot be written.
        """
        changes = status.plain(changes)
        if self._live is None:
            with exclusive(self.folder, self.id):
                self._write(replace(status.read(self.folder, as_written=True), **changes), changes)
            return
        with self._lock:
            self._live = replace(self._live, **changes)
            if not changes.keys() <= _PROGRESS:
                self._write(self._live, changes)

    def hand_over(self, spawn: Callable[[], int]) -> int:
        """Start the process that will train this run, and note which it is, so that its early death shows.

        Args:
            spawn: starts it and returns its number, which is returned.
        """
        with exclusive(self.folder, self.id):  # the new process waits for this before it writes
            pid = spawn()
            self._write(replace(status.read(self.folder, as_written=True), **status.process(pid)), {})
        return pid

    # What the process that trains does

    @contextmanager
    def session(self, signals: bool = True) -> Iterator["Run"]:
        """Be the one process that trains this run, from the first step to the final state.

        Keeps the heartbeat; takes SIGINT and SIGTERM as requests to stop (a second one interrupts at once), if this is
        the main thread and `signals` are wanted; records how it ended: `finish`, else done, else the exception.

        Raises:
            InputError: another process trains this run.
        """
        with exclusive(self.folder, self.id):
            before = self.status()
            self.signal, self._stop = None, False
            now = {"started": time.time(), "seconds": before.duration}
            self._live = replace(before, **status.process(), **now, first_started=before.begun or now["started"])
            over = threading.Event()
            beat = threading.Thread(target=self._beat, args=(over,), name="heartbeat", daemon=True)
            try:
                for name in FOLDERS:  # the empty ones are lost where a folder goes through git or an object store
                    (self.folder / name).mkdir(exist_ok=True)
                self.update(state="running", message="", ended=None, exit_code=None, queued=None, heartbeat=time.time())
                environment.renew(self.folder / "environment.json", first=before.started is None)
                beat.start()
                with stop_signals(self._on_signal) if signals else nullcontext():
                    yield self
                if self.status().state == "running":
                    self.finish("done")
            except BaseException as error:
                self._failed(error)
                raise
            finally:
                over.set()
                if beat.ident:
                    beat.join()
                self._live = None

    def finish(self, state: str, message: str = "", step: int | None = None, exit_code: int | None = None) -> None:
        """Record the session's end: done, stopped, failed or diverged, with the exit code that goes with it."""
        if exit_code is None:
            exit_code = {"done": 0, "stopped": 128 + (self.signal or signal.SIGTERM)}.get(state, 1)
        taken = {} if step is None else {"step": step}
        now, spent = time.time(), self.status().duration
        ended = {"ended": now, "heartbeat": now, "seconds": spent, **status.memory()}
        self.update(state=state, message=message, exit_code=exit_code, **ended, **taken)

    def requested(self) -> set[str]:
        """The requests that have come since the last call; "stop" stays once it came. Takes microseconds."""
        found = {kind for kind in REQUESTS if kind != "stop" and self._taken(kind)}
        return found | {"stop"} if self.asked_to_stop() else found

    def asked_to_stop(self) -> bool:
        """Whether this session shall end; other requests are left for `requested`. Takes microseconds."""
        self._stop = self._taken("stop") or self._stop
        if self._stop and self._live and self._live.message != status.STOPPING:
            with suppress(InputError):  # a full disk: it stops all the same
                self.update(message=status.STOPPING)
        return self._stop

    def _taken(self, kind: str) -> bool:
        try:
            os.unlink(self._requests[kind])
        except OSError:
            return False
        return True

    def metric(self, step: int, **values: Any) -> None:
        """Add a record to `metrics.jsonl`; `loss` and `rate` (the learning rate), if given, enter the status."""
        record = status.plain({"step": step, "time": time.time()} | values)
        append(self.folder / "metrics.jsonl", json.dumps(record) + "\n")
        self.update(step=step, **{key: values[key] for key in ("loss", "rate") if key in values})
        if self.watcher:
            self.watcher.metrics(step, values)

    def show(self, step: int, pictures: "Mapping[str, Sequence[Image]]") -> None:
        """Report samples that lie in the folder, by name, to what takes pictures beside it."""
        if self.watcher:
            self.watcher.pictures(step, pictures)

    def rewind_metrics(self, step: int) -> None:
        """Forget the metrics after `step`, from which training goes on."""
        if self.watcher:
            self.watcher.begin(step)
        lines = [line for line, record in self._metric_lines() if record["step"] <= step]
        write_atomic(self.folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines))

    def forget_requests(self) -> None:
        """Drop requests that nobody has answered, such as those to a process that died."""
        self.requested()
        self._stop = False

    def _write(self, record: Status, changes: dict[str, Any]) -> None:
        write_atomic(self.folder / "status.json", json.dumps(status.plain(asdict(record)), indent=2))
        if self.indexed and "state" in changes and (index := Index(self.root)).file.exists():
            try:
                index.put(replace(record, id=self.id))
            except EquipoiseError as error:  # the folder is the truth; the index can be made anew
                self.log(f"the index was not updated: {error}")

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT):
            try:
                with self._lock:
                    self._live = replace(self._live or self.status(), heartbeat=time.time(), **status.memory())
                    self._write(self._live, {})
            except InputError:
                continue  # a full disk may have room again later; the training itself meets the error where it writes

    def _on_signal(self, number: int) -> None:
        self.signal, self._stop = number, True
        os.write(2, b"\nStopping after this step; the state will be saved. Once more stops at once.\n")

    def _failed(self, error: BaseException) -> None:
        try:
            if isinstance(error, KeyboardInterrupt):
                message = "interrupted before its state was saved; the last checkpoint stays"
                self.finish("stopped", message, exit_code=128 + (self.signal or signal.SIGINT))
                return
            text = str(error) if isinstance(error, EquipoiseError) else "".join(traceback.format_exception(error))
            self.log(text)
            bad_input = isinstance(error, InputError) or disk_full(error)
            self.finish("failed", sentence(error), exit_code=2 if bad_input else 1)
        except InputError:  # nothing can be written; `error` itself is on its way to the user
            pass

    def _metric_lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The complete lines of `metrics.jsonl` with their records; what a crash or a bad disk left is no record."""
        with suppress(FileNotFoundError), open(self.folder / "metrics.jsonl", errors="replace") as file:
            for line in file:  # there may be millions
                yield from metric_lines(line)


class Following(Run):
    """A run as the processes see it that train it beside the first one, which alone writes and reads requests."""

    def log(self, text: str) -> None: ...

    def update(self, **changes: Any) -> None: ...

    def metric(self, step: int, **values: Any) -> None: ...

    def rewind_metrics(self, step: int) -> None: ...

    def requested(self) -> set[str]:
        return set()

    def asked_to_stop(self) -> bool:
        return False


def runs_folder(root: Path | str | None = None) -> Path:
    """Where runs are kept: `root`, EQUIPOISE_RUNS, or "runs"."""
    return Path(root or os.environ.get("EQUIPOISE_RUNS") or "runs").expanduser().resolve()


def metric_lines(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of (a part of) `metrics.jsonl` that are complete, with their records."""
    for line in text[: text.rfind("\n") + 1].splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def memory_full(error: BaseException) -> bool:
    """Whether that was the memory of a device, or of the machine; torch's error is known by its name."""
    named = {kind.__name__ for kind in type(error).__mro__}
    words = ("can't allocate memory", "ALLOC_FAILED", "CUDA error: out of memory")  # other ways in which torch says so
    return bool(named & {"OutOfMemoryError", "MemoryError"}) or any(word in str(error) for word in words)


def sentence(error: BaseException) -> str:
    """What went wrong, on one line."""
    if memory_full(error) and not isinstance(error, EquipoiseError):
        reason = " ".join(str(error).split())[:120].rstrip(". ") or type(error).__name__
        return (
            f"the memory is full ({reason}). The last checkpoint stays: end what else uses the memory and resume, or "
            "start a run that needs less, with a smaller train.batch and more train.accumulate, for instance."
        )
    if disk_full(error):
        return "the disk is full. Free some space, or choose another folder with runs=FOLDER, and resume."
    text = " ".join(str(error).split())
    return text if isinstance(error, EquipoiseError) else f"{type(error).__name__}: {text}".removesuffix(": ")
