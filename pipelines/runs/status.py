"""How a run stands: the record in its `status.json`, and whether the process behind it still lives."""

import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import psutil

from equipoise.errors import InputError
from equipoise.pipelines.config.format import FORMAT, KEY, check_format

STATES = ("queued", "running", "done", "stopped", "failed", "diverged", "dead")  # dead is derived, never written
STOPPING = "saves its state and stops."  # the message of a run that has been asked to
HEARTBEAT = 2.0  # seconds between two signs of life
_STALE = 30 * HEARTBEAT  # of a process on another host, which cannot be looked at


@dataclass(frozen=True)
class Status:
    """One run's state. Times are seconds since 1970; durations are seconds."""

    id: str
    kind: str = "run"  # run, sweep, or cell (of a sweep)
    sweep: str | None = None  # a cell's sweep
    name: str = ""
    pipeline: str = ""
    state: str = "queued"
    message: str = ""  # one sentence on how it ended
    doubt: str = ""  # one sentence on why its figures may not be what its configuration promises
    step: int = 0  # steps taken
    total: int | None = None  # steps to take
    loss: float | None = None  # the last one reported
    rate: float | None = None  # the learning rate of the last step
    learning_rate: float | None = None  # the configured one, which a schedule and the like change
    created: float = 0.0
    queued: float | None = None  # since when it waits in the queue
    started: float | None = None  # the latest session's start
    first_started: float | None = None  # the first one's
    ended: float | None = None
    seconds: float = 0.0  # spent training, over all sessions that have ended
    heartbeat: float | None = None
    host: str | None = None
    pid: int | None = None
    pid_started: float | None = None  # tells a process from a later one with the same number
    exit_code: int | None = None
    memory: int | None = None  # bytes, the most that its process has held
    device_memory: int | None = None  # bytes, the most that tensors have taken on its accelerator
    token: str = ""  # drawn when it was made; its checkpoints bear it
    format: int = FORMAT

    @property
    def duration(self) -> float:
        """Seconds spent training, over all sessions."""
        if self.started is None or self.state not in ("running", "dead"):
            return self.seconds
        last = time.time() if self.state == "running" else self.heartbeat
        return self.seconds + max(0.0, (last or self.started) - self.started)

    @property
    def begun(self) -> float | None:
        """When it first started; of a run of an earlier version, when it last did."""
        return self.first_started or self.started

    @property
    def shown_rate(self) -> float | None:
        """The learning rate to tell it by; of a run of an earlier version, that of its last step."""
        return self.rate if self.learning_rate is None else self.learning_rate

    @property
    def taken_out(self) -> bool:
        """Whether it was taken out of the queue before it began."""
        return self.state == "stopped" and self.pid is None

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more, unless it is resumed."""
        return self.state not in ("queued", "running")


_FIELDS = {name: get_args(kind) or (kind,) for name, kind in get_type_hints(Status).items()}  # name → types
_TIMES = ("created", "queued", "started", "first_started", "ended", "heartbeat", "pid_started")
_FREE = ("loss", "rate", "learning_rate")  # any number at all
_LATEST = 1e11  # seconds; the year 5138
_LARGEST_PID = 2**31 - 1
_MOST = 2**53  # of any other number: what every reader can hold, in seconds, steps and bytes


def read(folder: Path, as_written: bool = False) -> Status:
    """The status in a run's folder; unless wanted as written, `dead` where the process it speaks of is no more.

    Raises:
        InputError: there is no status, or it is not readable; NewerError where a later version wrote it.
    """
    file = os.path.join(folder, "status.json")
    try:
        about = os.stat(file)
        status = _parsed(file, about.st_ino, about.st_mtime_ns, about.st_size)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{folder}: is not a run: its status.json cannot be read ({error}).") from error
    if not as_written and status.pid is not None and not status.over and _dead(status):
        return replace(status, state="dead", message=f"process {status.pid} is gone; it may be resumed")
    return status


@lru_cache(10_000)  # who lists a thousand runs, and does so again and again, reads those that have changed
def _parsed(file: str, *version: int) -> Status:
    data = json.loads(Path(file).read_bytes())
    check_format(data.get(KEY, 1), Path(file).parent)
    for name in _FREE:  # NaN is a word in the file
        if data.get(name) is not None:
            data[name] = float(data[name])
    known = {key: value for key, value in data.items() if key in _FIELDS}
    for key, value in known.items():
        if not _fits(key, value):
            raise TypeError(f"{key} is {str(value)[:40]!r}")
    return Status(**known)


def _fits(key: str, value: Any) -> bool:
    """Whether a field can hold a value."""
    kinds = _FIELDS[key]
    if isinstance(value, bool) or not isinstance(value, (*kinds, int) if float in kinds else kinds):
        return False
    if value is None or isinstance(value, str) or key in _FREE:
        return True
    most = _LATEST if key in _TIMES else _LARGEST_PID if key == "pid" else _MOST
    return (-most if key == "exit_code" else 0) <= value <= most


def process(pid: int | None = None) -> dict[str, Any]:
    """The fields that identify a process, this one by default."""
    it = psutil.Process(pid)
    return {"host": platform.node(), "pid": it.pid, "pid_started": it.create_time()}


def memory() -> dict[str, int]:
    """The fields on the most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["device_memory"] = torch.cuda.max_memory_allocated()
    return found


def held() -> dict[str, float]:
    """What this process holds of memory now, in GB, as metrics of a step, and with nvidia-ml-py how busy its device is,
    in %."""
    found = {"memory_host": psutil.Process().memory_info().rss / 1e9}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["memory_device"] = torch.cuda.memory_allocated() / 1e9
        with suppress(Exception):  # of the package that is missing, or of a driver that does not tell
            found["load_device"] = float(torch.cuda.utilization())
    return found


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as strict JSON has them: scalars of arrays and tensors as numbers, NaN and infinities as words."""

    def one(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    return {key: one(value) for key, value in values.items()}


def is_process(process: psutil.Process, host: str, pid_started: float) -> bool:
    """Whether a process of this machine is the one that was recorded, and not another that has its number now."""
    return host == platform.node() and abs(process.create_time() - pid_started) < 2.0


def gone(host: str, pid: int, pid_started: float) -> bool:
    """Whether a process is no more. Of other hosts' processes nothing is known, so they never are."""
    if host != platform.node():
        return False
    started = _living(pid)
    return started is None or abs(started - pid_started) >= 2.0


def _dead(status: Status) -> bool:
    age = time.time() - (status.heartbeat or status.created)
    if status.host != platform.node():
        return age > _STALE
    started = _living(status.pid or 0)
    # A clock that was set meanwhile shifts the start times of processes, too: then the heartbeat decides.
    return started is None or (abs(started - (status.pid_started or 0.0)) >= 2.0 and age > 5 * HEARTBEAT)


def _living(pid: int) -> float | None:
    """When a process started; None if it is no more, or only waits for its parent to notice; NaN if that is secret."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return math.nan
