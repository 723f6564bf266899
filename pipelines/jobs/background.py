"""Runs, sweeps and comparisons as processes of their own, which outlive whoever started them.

Nothing is piped: what such a process prints goes into a file beside its results. Nothing here imports torch.
"""

import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from equipoise.errors import InputError
from equipoise.pipelines.files import explained, write_atomic
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs import status
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.status import Status
from equipoise.pipelines.runs.store import Store

_TURN = "has its turn and begins."
_PATIENCE = 10.0  # seconds that a comparison has to end in
_LOOK = 0.5  # seconds between two looks at who is ahead in the queue
COMPARISONS = "comparisons"  # the folder in a runs folder for comparisons of several runs, or with other prompts


def spawn(log: Path, *words: str) -> int:
    """Starts `equipoise WORDS` in a session of its own, printing into `log`; returns the process's number."""
    command = [sys.executable, "-P", "-m", "equipoise.pipelines.cli", *words]  # -P: no module of the current folder's
    with explained(log), open(log, "ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    threading.Thread(target=process.wait, daemon=True).start()  # so that no zombie is left while this process lives
    return process.pid


def start(made: Run, workers: int | None = None, in_turn: bool = False) -> int:
    """Trains a new run, or a sweep with that many workers, in the background; returns the process's number.

    Args:
        made: which.
        workers: of a sweep.
        in_turn: begin when nothing else in the runs folder is at work.

    Raises:
        InputError: It is being trained.
    """
    if made.status().kind == "sweep":
        words = ["sweep", str(made.folder), *(["--workers", str(workers)] if workers else [])]
    else:
        words = ["resume", str(made.folder), "--queued"]
    return made.hand_over(lambda: spawn(made.log_file, *words, *(["--in-turn"] if in_turn else [])))


def ahead(made: Run) -> Status | None:
    """Who keeps a run or sweep waiting for its turn: one at work, or else one made before it that waits, too."""
    mine, others = made.status(), Store(made.root).at_work()
    begun = {item.id for item in others if item.state == "running" or (item.pid and item.message == _TURN)}
    for item in sorted(others, key=lambda item: (item.id not in begun, item.created, item.id)):
        waits = item.pid and (item.created, item.id) < (mine.created, mine.id)
        if item.id != mine.id and (item.id in begun or waits):
            return item
    return None


def wait_for_turn(made: Run) -> bool:
    """Waits until nobody is ahead; False where it was cancelled meanwhile."""
    said = ""
    while made.status().state == "queued":
        if "stop" in made.requested():
            made.update(state="stopped", message="cancelled before it began.", ended=time.time(), exit_code=143)
        elif (first := _take_turn(made)) is None:
            return True
        else:
            if said != first.id:
                said = first.id
                made.update(message=f"waits for {said} to end.")
            time.sleep(_LOOK)
    return False


def _take_turn(made: Run) -> Status | None:
    """Who is ahead; None where nobody is, and then the turn is taken: who looks next finds this run ahead."""
    with open(made.root / ".turn", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (first := ahead(made)) is None:
            made.update(message=_TURN)
        return first


def resume(made: Run, workers: int | None = None, in_turn: bool = False) -> int:
    """Continues a run or sweep from its last checkpoints in the background; returns the process's number.

    Raises:
        InputError: It is being trained, is done, or is a sweep's cell.
    """
    now = made.status()
    if now.kind == "cell":
        raise InputError(f"{made.id}: is a cell; resume its sweep {now.sweep}, which trains what is left.")
    if not now.over:
        raise InputError(f"{made.id}: is at work already; stop it first.")
    if now.state == "done" and now.kind != "sweep":
        raise InputError(f"{made.id}: is done ({now.step} steps); there is nothing to resume. Start a new run instead.")
    made.update(state="queued", pid=None, message="", exit_code=None, ended=None)
    made.forget_requests()
    return start(made, workers, in_turn)


def stop(made: Run) -> str:
    """Asks a run, or all of a sweep, to save its state and stop, without waiting; returns what will happen.

    Raises:
        InputError: It is not at work.
    """
    now = made.status()
    if now.kind == "sweep" and now.state != "running":  # its workers outlive it where it was killed
        mine = sweeps.cells(made)
        if any(not cell.status().over for cell in mine):
            sweeps.stop(mine)
    elif now.over:
        raise InputError(f"{made.id}: is not at work; it is {now.state}.")
    if now.over:
        return f"{made.id}: its cells stop after their current steps."
    made.request("stop")
    if now.state == "queued" and now.pid:
        return f"{made.id}: is taken out of the queue."
    if now.state == "queued" and not now.pid:
        made.update(state="stopped", message="cancelled before it began.", ended=time.time(), exit_code=143)
        return f"{made.id}: cancelled before it began."
    return f"{made.id}: saves its state and stops after the current step."


def delete(made: Run) -> None:
    """Removes a run or sweep with all its files.

    Raises:
        InputError: It is at work, or is a sweep's cell.
    """
    now = made.status()
    if now.kind == "cell":
        raise InputError(f"{made.id}: is a cell; delete its sweep {now.sweep}, which takes all cells with it.")
    if not now.over or (now.kind == "sweep" and any(not cell.status().over for cell in sweeps.cells(made))):
        raise InputError(f"{made.id}: is at work; stop it first.")
    grave = made.root / f".deleted-{secrets.token_hex(4)}"
    with explained(made.folder):
        made.folder.rename(grave)  # at once, so that no reader meets half of it
    shutil.rmtree(grave, ignore_errors=True)


@dataclass(frozen=True)
class Job:
    """A comparison that is made, or was made, in the background."""

    name: str  # of its folder in RUNS/comparisons
    runs: tuple[str, ...]  # ids of runs and sweeps
    asked: dict[str, Any]  # prompts, count, scale, as far as they were given
    state: str  # running, done, dead
    created: float  # seconds since 1970
    log: str  # the end of what it printed


def compare(root: Path, runs: Sequence[str], asked: Mapping[str, Any]) -> str:
    """Compares runs in the background, with the base loaded once; returns the comparison's name.

    Args:
        root: The runs folder.
        runs: Ids of runs and sweeps.
        asked: `prompts`, `count`, `scale` where they are to be others than the runs' own; `scales` (several strengths),
            `checkpoints` (true) and `files` (paths of LoRA files) lay out files by strength.
    """
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    place = root / COMPARISONS
    with explained(place):
        place.mkdir(parents=True, exist_ok=True)
    words = [f"--prompt={prompt}" for prompt in asked.get("prompts", ())]
    words += [f"--{key}={asked[key]}" for key in ("count", "scale") if asked.get(key) is not None]
    words += [f"--scale={','.join(map(str, asked['scales']))}"] if asked.get("scales") else []
    words += ["--checkpoints"] if asked.get("checkpoints") else []
    pid = spawn(
        place / f"{name}.log",
        "compare",
        *runs,
        *asked.get("files", ()),
        f"--runs={root}",
        f"--out={place / name}",
        *words,
    )
    with suppress(Exception):  # a process that is over already; its result, or its log, tells
        record = {"runs": list(runs), "asked": dict(asked), "created": time.time(), **status.process(pid)}
        write_atomic(place / f"{name}.json", json.dumps(record, indent=1))
    return name


def jobs(root: Path) -> list[Job]:
    """The comparisons made in the background, newest first."""
    found = []
    for file in sorted((root / COMPARISONS).glob("*.json"), reverse=True):
        try:
            record = json.loads(file.read_text())
            who = {key: record[key] for key in ("host", "pid", "pid_started")}
            runs, asked, created = tuple(record["runs"]), dict(record["asked"]), float(record["created"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        done = (file.with_suffix("") / "table.json").is_file()
        state = "done" if done else "dead" if status.gone(**who) else "running"
        found.append(Job(file.stem, runs, asked, state, created, tail(file.with_suffix(".log"), 4)))
    return found


def discard(root: Path, name: str) -> None:
    """Ends a comparison's process, if it is at work on this machine, and removes all that it made.

    Raises:
        InputError: There is none of that name.
    """
    job = next((job for job in jobs(root) if job.name == name), None)
    if job is None:
        raise InputError(f"{name[:200]}: there is no such comparison.")
    place = root / COMPARISONS
    if job.state == "running":
        record = json.loads((place / f"{name}.json").read_text())
        with suppress(psutil.Error):  # it ends in this moment, or is somebody else's
            process = psutil.Process(record["pid"])
            if status.is_process(process, record["host"], record["pid_started"]):
                _end(process)
    for file in (place / f"{name}.json", place / f"{name}.log"):
        file.unlink(missing_ok=True)
    for folder in (place / name, *place.glob(f".{name}.*")):
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: psutil.Process) -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except psutil.TimeoutExpired:
        process.kill()


def tail(file: Path, lines: int) -> str:
    """The last lines of a log, as a terminal would show them."""
    try:
        with open(file, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 400 * lines - 4000))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.rstrip("\n").split("\n")]
    return "\n".join(shown[-lines:])
