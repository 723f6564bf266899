"""One process per run, and what a process makes of the signals that end it."""

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from equipoise.errors import InputError
from equipoise.pipelines.files import explained

_PATIENCE = 1.0  # seconds; others hold a run's lock for a moment when they change its status
_held: set[Path] = set()  # locked by this process, to which its own file locks are no obstacle
_guard = threading.Lock()


@contextmanager
def exclusive(folder: Path, id: str) -> Iterator[None]:
    """Hold a run's lock, which the operating system gives back when the process dies, however it dies.

    Raises:
        InputError: another session holds it.
    """
    until = time.monotonic() + _PATIENCE
    while not _mark(folder):
        if time.monotonic() > until:
            raise InputError(f"{id}: is being trained by this process already.")
        time.sleep(0.02)
    try:
        with explained(folder / "lock"):
            file = open(folder / "lock", "a+")
        with file:
            while not _lock(file):
                if time.monotonic() > until:
                    file.seek(0)
                    raise InputError(
                        f"{id}: is being trained by process {file.read().strip() or '?'}; "
                        f"`equipoise stop {folder}` stops it, or start another run."
                    )
                time.sleep(0.02)
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
    finally:
        _held.discard(folder)


@contextmanager
def stop_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop(number)` at the first SIGINT or SIGTERM; a second one raises KeyboardInterrupt.

    Does nothing outside the main thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, came = os.getpid(), []

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked data worker, which must die when its parent tells it to
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif came:
            raise KeyboardInterrupt
        else:
            came.append(number)
            stop(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _mark(folder: Path) -> bool:
    with _guard:
        if folder in _held:
            return False
        _held.add(folder)
        return True


def _lock(file: IO) -> bool:
    try:
        # lockf: unlike flock's, its locks are not inherited by forked data workers, which may outlive this process
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True
