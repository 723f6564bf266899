"""The table of runs as HTML, and how far each is."""

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.comparing.robustness import shown_rate
from equipoise.pipelines.files import version
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.run import Run, metric_lines
from equipoise.pipelines.runs.status import STATES, STOPPING, Status
from equipoise.ui import draw, runs_keys, runs_notes
from equipoise.ui.draw import esc
from equipoise.ui.safety import Site

SHOWN = 400  # rows of the table
LOOKED_AT = 200  # of the newest runs, whose keys are offered
SORTS = ("newest", "name", "state", "loss", "rate", "steps", "duration")
ARCHIVED = "archived"  # in place of a state: runs that were put away
_TAIL = 2**16  # bytes at the end of the metrics, which show the pace
MEAN_OF = 20  # steps whose losses are shown as one: a batch's alone says little
LOSS = "loss, mean of the last steps"
COLUMNS = ("state", "progress", "left", LOSS, "rate", "started", "took")  # beside the run itself
_ENOUGH = 2**14  # bytes at the end of the metrics, which hold so many steps


def open_run(site: Site, id: str) -> Run:
    """The run of exactly that id, a sweep's cell too.

    Raises:
        InputError: there is none.
    """
    try:
        run = site.store.get(id, kinds=("run", "sweep", "cell"))
    except InputError as error:
        raise InputError(site.without_paths(error)) from None
    if run.id != id:
        raise InputError(f"{id[:200]}: there is no such run.")
    return run


def sample_steps(run: Run) -> list[int]:
    """The steps at which a run drew or wrote samples."""
    found = [re.fullmatch(r"step-(\d+)", folder.name) for folder in run.samples.glob("step-*")]
    return sorted(int(match[1]) for match in found if match)


def table(
    site: Site,
    words: str = "",
    state: str = "all",
    sort: str = "newest",
    chosen: str = "",
    columns: Sequence[str] = COLUMNS,
) -> str:
    """The runs as an HTML table.

    Args:
        site: whose.
        words: only runs whose id, pipeline, message, notes or configuration have all of these words.
        state: only runs in this state, or "all"; those that were put away only where it is ARCHIVED.
        sort: one of SORTS, or a key of what is known of runs, from the lowest.
        chosen: the id that is marked.
        columns: what stands beside a run: of COLUMNS, or such keys.
    """
    found = site.store.list()
    if not found:
        return draw.empty("No runs yet", "Start one in the tab Launch: the embedded model needs no download.")
    wanted = words.lower().split()
    shown = [
        item
        for item in found
        if state in ("all", ARCHIVED, item.state)
        and runs_notes.read(site.store.root / item.id).archived == (state == ARCHIVED)
        and (not wanted or all(word in _text(site, item) for word in wanted))
    ]
    if not shown and state == "all" and not wanted:
        return draw.empty("All runs are put away", f"The state “{ARCHIVED}” shows them.")
    if not shown:
        return draw.empty("Nothing matches", "Clear the filter to see all runs.")
    if sort != "newest":
        shown.sort(key=_sorting(site, sort))
    head = "".join(f"<th>{esc(name)}</th>" for name in ("run", *columns))
    rows = "".join(_row(site, item, item.id == chosen.split("/")[0], columns) for item in shown[:SHOWN])
    more = f"<p class='hint'>{len(shown) - SHOWN} more: filter to see them.</p>" if len(shown) > SHOWN else ""
    inside = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f"<div class='scroll'><table class='runs'>{inside}</table></div>{more}"


def _sorting(site: Site, sort: str) -> Callable[[Status], Any]:
    """What runs are sorted by: of a key, numbers before words, and those that have none at the end."""

    def by_key(item: Status) -> tuple[int, Any]:
        value = runs_keys.known(site.store.root / item.id).get(sort)
        if (number := runs_keys.number(value)) is not None:
            return (0, number) if number == number else (2, 0)
        return (2, 0) if value is None else (1, runs_keys.shown(value))

    keys: dict[str, Callable[[Status], Any]] = {
        "name": lambda item: item.name,
        "state": lambda item: STATES.index(item.state) if item.state in STATES else 99,
        "loss": lambda item: _or_last(recent_loss(site.store.root / item.id, item)),
        "rate": lambda item: math.inf if item.shown_rate is None else item.shown_rate,
        "steps": lambda item: -item.step,
        "duration": lambda item: -item.duration,
    }
    return keys.get(sort, by_key)


def offered_columns(site: Site) -> list[str]:
    """What can stand beside a run: COLUMNS, and what is known of the newest runs."""
    keys: dict[str, None] = {}
    for item in site.store.list()[:LOOKED_AT]:
        keys |= dict.fromkeys(runs_keys.known(site.store.root / item.id))
    return [*COLUMNS, *sorted(keys)]


def _text(site: Site, item: Status) -> str:
    """All that a run can be found by, in small letters."""
    folder = site.store.root / item.id
    notes, config = runs_notes.read(folder), folder / "config.yaml"
    about = f"{item.id} {notes.name} {item.pipeline} {item.message} {' '.join(notes.tags)} {notes.note} "
    return about.lower() + _config_text(config, *version(config))


@lru_cache(10_000)
def _config_text(file: Path, *version: int) -> str:
    try:
        return file.read_text(errors="replace").lower()
    except OSError:
        return ""


def _row(site: Site, item: Status, chosen: bool, columns: Sequence[str]) -> str:
    if item.kind == "sweep":
        item = together(Run(site.store.root / item.id), item)
    folder = site.store.root / item.id
    notes = runs_notes.read(folder)
    tags = "".join(f"<span class='tag'>{esc(tag)}</span>" for tag in notes.tags)
    about = [*([item.id] if notes.name else []), f"{item.pipeline}{' · sweep' if item.kind == 'sweep' else ''}"]
    run = (
        f"<button class='link' data-id='{esc(item.id)}'>{draw.breakable(notes.name or item.id)}</button>"
        f"{''.join(f'<small>{esc(line)}</small>' for line in about)}"
        f"{tags}{f'<small>{esc(notes.note[:80])}</small>' if notes.note else ''}"
    )
    cells = {"run": run, **{name: _column(site, item, name) for name in columns}}
    inside = "".join(f"<td data-name='{esc(name)}'>{cell}</td>" for name, cell in cells.items())
    return f"<tr{' class=chosen' if chosen else ''}>{inside}</tr>"


def _column(site: Site, item: Status, name: str) -> str:
    """What stands in a run's row below the name of a column."""
    folder = site.store.root / item.id
    made: dict[str, Callable[[], str]] = {
        "state": lambda: badge(item),
        "progress": lambda: bar(item),
        "left": lambda: left(site, item),
        LOSS: lambda: draw.number(recent_loss(folder, item)),
        "rate": lambda: rate(item.shown_rate),
        "started": lambda: f"{datetime.fromtimestamp(item.begun):%d %b %H:%M}" if item.begun else "",
        "took": lambda: draw.span(item.duration) if item.started else "",
    }
    return made[name]() if name in made else esc(runs_keys.shown(runs_keys.known(folder).get(name)))


def rate(value: float | None) -> str:
    """A learning rate as comparisons write it; nothing where it is not known or 0."""
    return "" if value is None else shown_rate(value, 2) if value > 0 else draw.number(value)


def _or_last(loss: float | None) -> float:
    return loss if loss is not None and loss == loss else math.inf


def recent_loss(folder: Path, item: Status) -> float | None:
    """The mean of a run's last losses, as far as they are measured; where none is, the last one that it reported."""
    try:
        file = folder / "metrics.jsonl"
        found = _mean_loss(file, *version(file)) if item.kind != "sweep" else None
    except OSError:  # deleted since
        found = None
    return item.loss if found is None else found


@lru_cache(10_000)  # who lists a thousand runs, and does so again and again, reads those that have changed
def _mean_loss(file: Path, *version: int) -> float | None:
    with suppress(OSError), open(file, "rb") as metrics:
        metrics.seek(max(0, metrics.seek(0, os.SEEK_END) - _ENOUGH))
        lines = metrics.read().decode(errors="replace").splitlines(keepends=True)[-MEAN_OF - 1 :]
        losses = [
            float(it["loss"]) for _, it in metric_lines("".join(lines)) if "loss" in it and _is_number(it["loss"])
        ]
        return math.fsum(losses[-MEAN_OF:]) / len(losses[-MEAN_OF:]) if losses else None
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity")


def badge(item: Status, ended: bool = False) -> str:
    """A run's state in a word. `ended`: its sweep is over, so that a cell which waits will not begin."""
    waited = item.kind == "cell" and item.started is None
    idle = waited and (item.state == "stopped" or (ended and item.state == "queued"))
    words = "stopping" if item.message == STOPPING else "not begun" if idle else item.state
    return f"<span class='badge {esc(item.state)}' title='{esc(item.message)}'>{esc(words)}</span>"


def together(run: Run, now: Status) -> Status:
    """A run's status; of a sweep with the steps of its cells, which its own file counts now and then, and only while
    it lives."""
    if now.kind != "sweep" or now.state not in ("running", "dead"):
        return now
    cells = [cell.status() for cell in sweeps.cells(run)]
    return replace(
        now, step=sum(cell.total or 0 if cell.over and cell.state != "stopped" else cell.step for cell in cells)
    )


def bar(item: Status) -> str:
    share = min(1.0, item.step / item.total) if item.total else 0.0
    words = f"{item.step} of {item.total}" if item.total else f"{item.step}"
    return (
        f"<div class='bar' role='progressbar' aria-valuemin='0' aria-valuemax='100' aria-valuenow='{100 * share:.0f}'"
        f" aria-label='steps'><i style='width:{share:.1%}'></i></div>"
        f"<small>{words}</small>"
    )


def left(site: Site, item: Status) -> str:
    """The time that is left, in words; empty where it is not known yet."""
    if item.state != "running":
        return ""
    run = Run(site.store.root / item.id)
    seconds = _left_of_sweep(run) if item.kind == "sweep" else _left(run, item)
    return "" if seconds is None else draw.span(seconds)


def _left(run: Run, item: Status) -> float | None:
    """Seconds, by the pace of the last steps since the run was loaded."""
    if item.state != "running" or not item.total or not item.step or item.duration <= 0:
        return None
    times: list[tuple[int, float]] = []
    with suppress(OSError), open(run.folder / "metrics.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        lines = metric_lines(file.read().decode(errors="replace"))
        times = [
            (it["step"], it["time"]) for _, it in lines if (item.started or 0) <= _number(it.get("time")) < math.inf
        ]
    if len(times) < 2:
        return None
    (before, began), (step, now) = times[0], times[-1]
    return max(0, item.total - item.step) * (now - began) / max(1, step - before)


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else math.nan


def _left_of_sweep(sweep: Run) -> float | None:
    """Seconds, by what is left of the cells that run, and for the others what one has taken or will have."""
    cells = [(now, _left(cell, now)) for cell in sweeps.cells(sweep) if (now := cell.status()).state != "stopped"]
    running = [(now.duration, seconds) for now, seconds in cells if seconds is not None]
    each = [now.duration for now, _ in cells if now.state == "done"] or [sum(times) for times in running]
    waiting = sum(not now.over and seconds is None for now, seconds in cells)
    if not each or not (waiting or running):
        return None
    at_once = max(1, sum(now.state == "running" for now, _ in cells))
    rest = [seconds for _, seconds in running]
    return max([*rest, (waiting * sum(each) / len(each) + sum(rest)) / at_once])
