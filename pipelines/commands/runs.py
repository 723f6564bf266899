"""`equipoise runs`: the runs so far and how they stand.
`equipoise logs`: what a run has printed.
`equipoise stop`: ask a run to save its state and stop.

Two read the runs folder, and the third writes requests into it.
"""

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timedelta

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.jobs.executors import remembered
from equipoise.pipelines.runs import status
from equipoise.pipelines.runs.outcome import ending
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.status import Status
from equipoise.pipelines.runs.store import TOP, Store, find
from equipoise.pipelines.tables import table

_SHOWN = 20
_COLUMNS = ("STATE", "STEP", "%", "LOSS", "RATE", "STARTED", "TIME", "NOTE")
_ENDS = 3  # lines of each cell's log
_POLL = 0.2  # seconds between two looks
_GRACE = 10.0  # seconds that a process has after being interrupted, before it is killed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command = parser.get_default("command")
    if command == "runs":
        parser.add_argument(
            "--all", action="store_true", help=f"List all runs and the cells of sweeps, not only the newest {_SHOWN}."
        )
        parser.add_argument("--json", action="store_true", help="Print JSON.")
    else:
        parser.add_argument("run", metavar="RUN", help="An id or its beginning, a folder, or latest.")
    if command == "logs":
        parser.add_argument("--follow", "-f", action="store_true", help="Print what is added until the run is over.")
    if command == "stop":
        parser.add_argument(
            "--now", action="store_true", help="Stop at once, without saving; the last checkpoint stays."
        )
        parser.add_argument(
            "--timeout",
            type=float,
            default=120.0,
            metavar="SECONDS",
            help="How long to wait for it (default: %(default)g).",
        )
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")


def run(args: argparse.Namespace) -> int:
    return {"runs": _runs, "logs": _logs, "stop": _stop}[args.command](args)


def _runs(args: argparse.Namespace) -> int:
    store = Store(args.runs)
    found = store.list(kinds=(*TOP, "cell") if args.all else TOP)
    shown = found if args.all else found[:_SHOWN]
    if args.json:
        print(json.dumps([status.plain(asdict(item) | {"duration": item.duration}) for item in shown], indent=2))
        return 0
    if not shown:
        print(f"No runs in {store.root}. `equipoise train CONFIG` makes one; --runs FOLDER looks elsewhere.")
        return 0
    several = len({item.pipeline for item in shown if item.pipeline}) > 1
    headers = ["RUN", *(["PIPELINE"] if several else []), *_COLUMNS]
    print(table(headers, [_row(item, several) for item in shown]))
    if len(found) > len(shown):
        print(f"{len(found) - len(shown)} older ones: --all shows them.")
    return 0


def _row(item: Status, several: bool) -> list[str]:
    """A run's cells, its pipeline's among them where there are `several`."""
    return [
        item.id,
        *([item.pipeline] if several else []),
        item.state,
        f"{item.step}/{item.total}" if item.total else str(item.step),
        f"{100 * item.step // item.total}" if item.total else "",
        "" if item.loss is None else f"{item.loss:.4g}",
        "" if item.shown_rate is None else f"{item.shown_rate:.3g}",
        f"{datetime.fromtimestamp(item.begun):%m-%d %H:%M:%S}" if item.begun else "",
        str(timedelta(seconds=round(item.duration))),
        item.message,
    ]


def _logs(args: argparse.Namespace) -> int:
    found = find(args.run, args.runs)
    if found.status().kind == "sweep":
        return _cells_logs(found, args)
    raw = args.follow and sys.stdout.isatty()  # a terminal shows a progress bar move; elsewhere its last state will do
    rest = ""
    for chunk in _chunks(found, args.follow):
        *lines, rest = (rest + chunk).split("\n")
        sys.stdout.write(chunk if raw else "".join(map(_settled, lines)))
        sys.stdout.flush()
    if rest and not raw:
        sys.stdout.write(_settled(rest))
    return 0


def _cells_logs(found: Run, args: argparse.Namespace) -> int:
    """A sweep has no log of its own: how its cells stand, and the end of what each has printed."""
    mine = sweeps.cells(found)
    now = [cell.status() for cell in mine]
    chosen = next((it.id for it in now if it.state == "running"), now[0].id if now else "CELL")
    if args.follow and not found.status().over:
        raise InputError(
            f"{found.id}: is a sweep, each of whose cells has a log. `equipoise logs {chosen} --follow` follows one."
        )
    for cell, stands in zip(mine, now, strict=True):
        print(f"{cell.id}: {_ending(stands)}")
        for line in "".join(_chunks(cell, follow=False)).splitlines()[-_ENDS:]:
            print(f"    {line}")
    print(f"\nAll of one: equipoise logs {chosen}")
    if remembered(found).executor == "local":
        print(f"What the workers printed: {found.folder / 'workers.txt'}")
    return 0


def _chunks(found: Run, follow: bool) -> Iterator[str]:
    """The log as it is, and, to be followed, as it grows until the run is over."""
    with open(found.log_file, encoding="utf-8", errors="replace", newline="") as file:
        while True:
            last = not follow or found.status().over  # looked up before reading, so that the end is not missed
            yield file.read()
            if last:
                return
            time.sleep(_POLL)


def _settled(line: str) -> str:
    """A line as a terminal shows it in the end, when all carriage returns have done their work."""
    return line.rstrip("\r").rpartition("\r")[2] + "\n"


def _stop(args: argparse.Namespace) -> int:
    found = find(args.run, args.runs)
    now = found.status()
    if now.kind == "sweep" and now.state != "running":
        return _stop_cells(found, args)
    if now.over:
        print(f"{found.id}: is not running; {_ending(now)}")
        return 0
    if args.now and now.pid:
        return _interrupt(found, now)
    found.request("stop")
    if now.state == "queued" and not now.pid:  # a worker that has just claimed it will find the request
        found.update(state="stopped", message="cancelled before it began.", ended=time.time(), exit_code=143)
    elif not _over_within(found, args.timeout):
        raise EquipoiseError(
            f"{found.id}: is still at work after {args.timeout:g} s. The request stands and is met after the current "
            f"step; `equipoise stop {args.run} --now` does not wait for that."
        )
    print(f"{found.id}: {_ending(found.status())}")
    return 0


def _stop_cells(found: Run, args: argparse.Namespace) -> int:
    """Stop what a sweep's workers do, which outlive it where it was killed."""
    mine = sweeps.cells(found)
    if all(cell.status().over for cell in mine):
        print(f"{found.id}: is not running; {_ending(found.status())}")
        return 0
    if args.now:
        sweeps.interrupt(mine)
    else:
        sweeps.stop(mine)
    late = [cell.id for cell in mine if not _over_within(cell, args.timeout)]
    if late:
        raise EquipoiseError(
            f"{', '.join(late[:3])}: still at work after {args.timeout:g} s. The request stands and is met after the "
            f"current step; `equipoise stop {args.run} --now` does not wait for that."
        )
    if not found.status().over:
        found.update(state="stopped", message="cancelled before it began.", ended=time.time(), exit_code=143)
    for cell in mine:
        print(f"{cell.id}: {_ending(cell.status())}")
    return 0


def _interrupt(found: Run, now: Status) -> int:
    if now.host != platform.node():
        raise InputError(
            f"{found.id}: runs on {now.host}; --now works there only. Without it the request goes by file."
        )
    for _ in range(2):  # the first asks to stop after the step, the second interrupts
        _signal(now, signal.SIGTERM)
        if _over_within(found, 0.5):
            break
    if not _over_within(found, _GRACE):
        _signal(now, signal.SIGKILL)
        _over_within(found, _GRACE)
    if now.kind == "sweep":
        sweeps.interrupt(sweeps.cells(found))  # what it has not ended itself
    print(f"{found.id}: {_ending(found.status())}")
    return 0


def _signal(now: Status, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(now.pid or 0, number)


def _over_within(found: Run, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not found.status().over:
        if time.monotonic() > until:
            return False
        time.sleep(_POLL)
    return True


def _ending(now: Status) -> str:
    step = f" at step {now.step}" + (f" of {now.total}" if now.total else "")
    return ending(now.state, now.message, step)
