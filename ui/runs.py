"""The tab Runs: how every run stands, and of one of them its curves, samples, log, configuration and files."""

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from io import BytesIO
from pathlib import Path
from posixpath import commonpath
from typing import Any

import gradio as gr
import psutil
from gradio.context import Context

from equipoise import registry
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.commands.compare import being_made
from equipoise.pipelines.config.keys import section_at
from equipoise.pipelines.jobs import background
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.run import Run, metric_lines
from equipoise.pipelines.runs.status import STATES, STOPPING, Status
from equipoise.ui import draw
from equipoise.ui.draw import esc
from equipoise.ui.safety import SUFFIXES, Site
from equipoise.ui.widgets import ON_CLICK, Slider

REFRESH = 2.0  # seconds
LOG_LINES = 60
SHOWN = 400  # rows of the table, and pictures of a run
SORTS = ("youngest", "name", "state", "loss", "duration")
MOST_READ = 200  # runs whose curves are kept in memory
_PIECE = 2**20  # bytes of metrics that are read at a time
_TAIL = 2**16  # bytes at their end, which tell the pace
MOST_POINTS = 8_000  # of a curve; of a longer one, the lowest and the highest of so many steps that it has no more
Curves = dict[str, list[tuple[float, float]]]
_NOT_CURVES = ("step", "time", "seconds")
_GROUP = re.compile(r"val_[^_]+|[^_]+")  # names that begin so share a chart
_SYMBOLS = {"kappa": "κ", "joint_weight": "α, the joint gradient's weight", "alpha": "α"}  # as papers write
_SECONDS = ("balancing", "loading")
_LOG_SCALE = ("loss", "rate")  # what spans decades
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_COLUMNS = ("run", "state", "progress", "left", "loss", "rate", "started", "took")

ON_RUN = ON_CLICK.replace("trigger(", "equipoise.at({run: chosen.dataset.id}), trigger(")


def table(site: Site, words: str = "", state: str = "all", sort: str = "youngest", chosen: str = "") -> str:
    """The runs as an HTML table.

    Args:
        site: whose.
        words: only runs whose id, pipeline or message have all of these words.
        state: only runs in this state, or "all".
        sort: one of SORTS.
        chosen: the id that is marked.
    """
    found = site.store.list()
    if not found:
        return draw.empty("No runs yet", "Start one in the tab Launch: the embedded model needs no download.")
    wanted = words.lower().split()
    shown = [
        item
        for item in found
        if state in ("all", item.state)
        and all(word in f"{item.id} {item.pipeline} {item.message}".lower() for word in wanted)
    ]
    if not shown:
        return draw.empty("Nothing matches", "Clear the filter to see all runs.")
    keys = {
        "name": lambda item: item.name,
        "state": lambda item: STATES.index(item.state) if item.state in STATES else 99,
        "loss": lambda item: item.loss if item.loss is not None and item.loss == item.loss else float("inf"),
        "duration": lambda item: -item.duration,
    }
    if sort in keys:
        shown.sort(key=keys[sort])
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "".join(_row(site, item, item.id == chosen.split("/")[0]) for item in shown[:SHOWN])
    more = f"<p class='hint'>{len(shown) - SHOWN} more: filter to see them.</p>" if len(shown) > SHOWN else ""
    inside = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f"<div class='scroll'><table class='runs'>{inside}</table></div>{more}"


def _row(site: Site, item: Status, chosen: bool) -> str:
    item = together(Run(site.store.root / item.id), item)
    cells = [
        f"<button class='link' data-id='{esc(item.id)}'>{draw.breakable(item.id)}</button>"
        f"<small>{esc(item.pipeline)}{' · sweep' if item.kind == 'sweep' else ''}</small>",
        badge(item),
        bar(item),
        left(site, item),
        draw.number(item.loss),
        draw.number(item.rate, 3),
        f"{datetime.fromtimestamp(item.started):%d %b %H:%M}" if item.started else "",
        draw.span(item.duration) if item.started else "",
    ]
    inside = "".join(f"<td data-name='{name}'>{cell}</td>" for name, cell in zip(_COLUMNS, cells, strict=True))
    return f"<tr{' class=chosen' if chosen else ''}>{inside}</tr>"


def badge(item: Status, ended: bool = False) -> str:
    """A run's state in a word. `ended`: its sweep is over, so that a cell which waits will not begin."""
    waited = item.kind == "cell" and item.started is None
    idle = waited and (item.state == "stopped" or (ended and item.state == "queued"))
    words = "stopping" if item.message == STOPPING else "not begun" if idle else item.state
    return f"<span class='badge {esc(item.state)}' title='{esc(item.message)}'>{esc(words)}</span>"


def together(run: Run, now: Status) -> Status:
    """How a sweep stands by its cells, which it looks at only now and then, and when it is dead no more; a run as it
    is."""
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
    """The time that is left, in words; nothing where it cannot be told yet."""
    run = Run(site.store.root / item.id)
    seconds = _left_of_sweep(run) if item.kind == "sweep" and item.state == "running" else _left(run, item)
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


# One run


def heading(site: Site, id: str) -> str:
    """What a run is and how it stands, with its cells where it is a sweep."""
    if not id:
        return draw.empty("Choose a run", "Its curves, samples, log and files appear here.")
    run = open_run(site, id)
    now = together(run, run.status())
    back = f"<button class='link' data-id='{esc(run.sweep)}'>← {esc(run.sweep)}</button>" if run.sweep else ""
    ended = bool(run.sweep) and _ended(open_run(site, run.sweep).status())
    told = {
        "pipeline": now.pipeline,
        "step": f"{now.step} of {now.total}" if now.total else now.step,
        "left": left(site, now),
        "loss": draw.number(now.loss),
        "rate": draw.number(now.rate, 3),
        "took": draw.span(now.duration) if now.started else "",
        "memory": _memory(now),
        "process": f"{now.pid} on {now.host}" if now.state == "running" else "",
    }
    parts = [
        back,
        f"<h3>{draw.breakable(run.id)} {badge(now, ended)}</h3>",
        bar(now),
        draw.notice(now.message, "bad" if now.state in ("failed", "dead", "diverged") else "info"),
        draw.facts({key: value for key, value in told.items() if value != ""}),
    ]
    if now.over and (count := being_made(run.folder / "comparison")) is not None:
        parts.append(draw.notice(f"Trained; being compared now: {count} files so far."))
    if now.state == "dead":
        parts.append(f"<pre class='log'>{esc(background.tail(run.log_file, 8))}</pre>")
    if now.kind == "sweep":
        parts.append(_cells(run, _ended(now)))
    return "".join(parts)


def open_run(site: Site, id: str) -> Run:
    """The run of exactly that id, a sweep's cell too.

    Raises:
        InputError: there is none.
    """
    try:
        run = site.store.get(id, kinds=("run", "sweep", "cell"))
    except InputError as error:
        raise InputError(site.told(error)) from None
    if run.id != id:
        raise InputError(f"{id[:200]}: there is no such run.")
    return run


def _ended(sweep: Status) -> bool:
    """Whether no cell of it begins any more: the workers of a sweep that was killed may well live."""
    return sweep.over and sweep.state != "dead"


def _cells(sweep: Run, ended: bool) -> str:
    rows = []
    for cell in sweeps.cells(sweep):
        now = cell.status()
        short = draw.breakable(cell.folder.name)
        rows.append(
            f"<tr><td><button class='link' data-id='{esc(cell.id)}'>{short}</button></td><td>{badge(now, ended)}</td>"
            f"<td>{bar(now)}</td><td data-name='loss'>{draw.number(now.loss)}</td></tr>"
        )
    head = "<thead><tr><th>cell</th><th>state</th><th>progress</th><th>loss</th></tr></thead>"
    return f"<div class='scroll'><table class='runs cells'>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _memory(now: Status) -> str:
    """What the process that trains holds in main memory."""
    if now.state != "running" or not now.pid:
        return ""
    try:
        return f"{psutil.Process(now.pid).memory_info().rss / 1e9:.2f} GB"
    except psutil.Error:
        return ""


def charts(site: Site, id: str) -> str:
    """A run's metrics over its steps, those of one kind in one chart; of a sweep, its cells' losses."""
    if not id:
        return ""
    run = open_run(site, id)
    if run.status().kind == "sweep":
        lines = {cell.folder.name: read_curves(cell).get("loss", []) for cell in sweeps.cells(sweep=run)}
        return f"<div class='charts wide'>{draw.chart('loss of each cell', lines, log=True)}</div>" or ""
    lines = read_curves(run)
    if not lines and run.status().over:
        return draw.empty("Nothing was measured", "It ended before its first step.")
    if not lines:
        return draw.empty("Nothing measured yet", "Curves appear after the first steps.")
    groups: dict[str, list[str]] = {}
    for name in lines:
        start = _GROUP.match(name)
        groups.setdefault(start[0] if start else name, []).append(name)
    drawn = [
        draw.chart(_title(group, some), {name: lines[name] for name in some}, log=group in _LOG_SCALE)
        for group, some in groups.items()
    ]
    return f"<div class='charts'>{''.join(drawn)}</div>"


class _Curve:
    """A line that grows, and of which little is kept however long it is."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, float]] = []
        self._new: list[tuple[float, float]] = []  # less than a group
        self._last: list[tuple[float, float]] = []  # which is shown as what is the case now
        self._size = 2  # of a group, of which two points are kept

    def add(self, point: tuple[float, float]) -> None:
        if not math.isfinite(point[1]):
            return
        self._last = [point]
        self._new.append(point)
        if len(self._new) == self._size:
            self._kept += draw.thinned(self._new, self._size)
            self._new.clear()
        if len(self._kept) >= MOST_POINTS:
            self._kept, self._size = draw.thinned(self._kept, 4), 2 * self._size

    def points(self) -> list[tuple[float, float]]:
        known = [*self._kept, *self._new]
        return known if known[-1:] == self._last else known + self._last


@dataclass
class _Read:
    """What has been read of a file of metrics."""

    size: int = 0
    end: bytes = b""  # what stood before there, which tells a file that has grown from another one
    lines: dict[str, "_Curve"] = field(default_factory=dict)
    busy: threading.Lock = field(default_factory=threading.Lock)  # several pages may be open


def read_curves(run: Run) -> Curves:
    """What a run measured: name → (step, value). Of a file that has grown only what is new is read, in pieces."""
    with _reading:
        known = _read[run.folder] = _read.pop(run.folder, _Read())  # as the youngest
        while len(_read) > MOST_READ:
            del _read[next(iter(_read))]
    with known.busy:
        _read_on(known, run.folder / "metrics.jsonl")
        return {name: curve.points() for name, curve in known.lines.items()}


def _read_on(known: _Read, path: Path) -> None:
    with path.open("rb") if path.exists() else BytesIO() as file:
        file.seek(known.size - len(known.end))
        if file.read(len(known.end)) != known.end:  # it was rewound
            known.size, known.end, known.lines = 0, b"", {}
            file.seek(0)
        while text := file.read(_PIECE) + file.readline():
            new = text[: text.rfind(b"\n") + 1]
            if not new:  # the line is still being written
                break
            for _, record in metric_lines(new.decode(errors="replace")):
                for name, value in record.items():
                    number = float(value) if value in ("NaN", "Infinity", "-Infinity") else value
                    if name not in _NOT_CURVES and isinstance(number, int | float):
                        known.lines.setdefault(name, _Curve()).add((record["step"], number))
            known.size, known.end = known.size + len(new), new[-100:]


_read: dict[Path, _Read] = {}
_reading = threading.Lock()


def _title(group: str, names: list[str]) -> str:
    """What the names in a chart have in common, in words."""
    title = commonpath(name.replace("_", "/") for name in names).replace("/", "_") or group
    symbol = next((symbol for name, symbol in _SYMBOLS.items() if title.startswith(name)), "")
    unit = ", seconds" if title in _SECONDS else ""
    return symbol or title.replace("val_", "validation ").replace("_", " ") + unit


def sample_steps(run: Run) -> list[int]:
    """The steps at which a run drew or wrote samples."""
    found = [re.fullmatch(r"step-(\d+)", folder.name) for folder in run.samples.glob("step-*")]
    return sorted(int(match[1]) for match in found if match)


def followed(steps: Sequence[int], at: float | None, end: int) -> tuple[int | None, int, int]:
    """How a slider over steps goes on when there may be more of them.

    Args:
        steps: those that there are now.
        at: where it stands.
        end: where it ended until now.

    Returns:
        The step to show, None for the last; and the slider's first and last step.
    """
    shown = None if at is None or at >= end else round(at)
    return shown, min(steps, default=0), max(steps, default=0) or 1


def samples(site: Site, id: str, step: int | None = None) -> str:
    """What a run drew at the step nearest to the given one, or at its last."""
    if not id:
        return ""
    run = open_run(site, id)
    steps = sample_steps(run)
    if not steps:
        return draw.empty(*_none_drawn(run.status()))
    near = steps[-1] if step is None else min(steps, key=lambda one: abs(one - step))
    folder = run.samples / f"step-{near:08d}"
    parts = []
    for file in sorted(folder.iterdir())[:SHOWN]:
        name = f"{run.id}/samples/{folder.name}/{file.name}"
        if file.suffix in _PICTURES:
            image = f"<img loading='lazy' src='{url(name)}' alt='{esc(file.stem)}'>"
            parts.append(f"<a href='{url(name)}' target='_blank'>{image}</a>")
        elif file.suffix == ".jsonl":
            parts.append(draw.table(file.read_text(errors="replace")))
        elif file.suffix in (".txt", ".json", ".md"):
            parts.append(f"<pre>{esc(file.read_text(errors='replace')[:20_000])}</pre>")
    return f"<p class='hint'>step {near}</p><div class='samples'>{''.join(parts)}</div>"


def _none_drawn(now: Status) -> tuple[str, str]:
    """Why there are no samples, and what to do."""
    if now.kind == "sweep":
        return "A sweep draws none itself", "Choose one of its cells above, or see them side by side in Compare."
    if not draws(now.pipeline):
        return "No samples", "This pipeline draws none; its results are among the files, and in Compare."
    if now.over:
        return (
            "No samples",
            "samples.every would have had some drawn while it was trained; Compare draws from its result.",
        )
    return "No samples yet", "samples.every sets how often they are drawn; Sample now asks for some."


def draws(pipeline: str) -> bool:
    """Whether a pipeline draws or writes samples while it trains."""
    try:
        return section_at(registry.load("pipelines", pipeline).Config, "samples") is not None
    except EquipoiseError:  # not installed here
        return False


def log(site: Site, id: str) -> str:
    """The end of a run's log, of a sweep its own and its workers'."""
    if not id:
        return ""
    run = open_run(site, id)
    text = background.tail(run.log_file, LOG_LINES)
    workers = background.tail(run.folder / "workers.txt", 20)
    more = f"<h4>workers</h4><pre class='log'>{esc(workers)}</pre>" if workers else ""
    return f"<pre class='log'>{esc(text) or 'nothing yet'}</pre>{more}"


def config_text(site: Site, id: str) -> str:
    if not id:
        return ""
    try:
        return (open_run(site, id).folder / "config.yaml").read_text(errors="replace")
    except OSError as error:
        return f"# {id}/config.yaml cannot be read: {error.strerror}. Without it the run can be shown, but not resumed."


def files(site: Site, id: str) -> str:
    """A run's files, to be downloaded."""
    if not id:
        return ""
    run = open_run(site, id)
    found = [run.folder / name for name in ("config.yaml", "environment.json", "metrics.jsonl", "log.txt")]
    found += sorted(file for file in run.result.rglob("*") if file.is_file())
    if (run.folder / "comparison").is_dir():
        found += sorted(file for file in (run.folder / "comparison").iterdir() if file.is_file())
    rows = []
    for file in found:
        if file.is_file() and file.suffix in SUFFIXES:
            name = f"{run.id}/{file.relative_to(run.folder).as_posix()}"
            size = file.stat().st_size
            shown = f"{size / 1e6:.1f} MB" if size > 1e6 else f"{size / 1e3:.1f} kB"
            words = esc(file.relative_to(run.folder))
            rows.append(f"<li><a href='{url(name)}?download=1'>{words}</a> <small>{shown}</small></li>")
    return f"<ul class='files'>{''.join(rows)}</ul>"


def url(name: str) -> str:
    """Where the server has a file of the runs folder."""
    return esc(f"/runs-file/{name}".replace("%", "%25").replace("+", "%2B").replace(",", "%2C").replace("=", "%3D"))


# The page


def unchanged(outputs: Sequence[Any], seen: Sequence[str]) -> tuple[list[Any], list[str]]:
    """The outputs, those that are what the page has already left out; and their digests, for the next time."""
    digests = [hashlib.blake2s(json.dumps(one, default=str).encode(), digest_size=8).hexdigest() for one in outputs]
    before = [*seen, *[""] * (len(outputs) - len(seen))]
    return [gr.skip() if a == b else out for out, a, b in zip(outputs, digests, before, strict=True)], digests


def possible(site: Site, id: str) -> list[Any]:
    """Updates of the buttons for stopping, sampling and resuming, by what a run allows now."""
    try:
        run = open_run(site, id) if id else None
        now = run.status() if run else None
    except EquipoiseError:
        run = now = None
    if run is None or now is None:
        return [gr.update(interactive=False)] * 3
    stops = not now.over
    resumes = now.over and now.kind != "cell" and now.state != "done"
    if now.over and now.kind == "sweep":  # whose cells may have failed although it is done
        cells = [cell.status() for cell in sweeps.cells(run)]
        resumes = now.state == "dead" or any(cell.state not in ("done", "diverged") for cell in cells)
        stops = any(not cell.over for cell in cells)  # by workers that outlive it
    samples = now.state == "running" and now.kind != "sweep"
    stop, sample, resume = (gr.update(interactive=can) for can in (stops, samples, resumes))
    return [stop, {**sample, "visible": now.kind != "sweep" and draws(now.pipeline)}, resume]


def detail(site: Site, id: str, step: int | None) -> list[Any]:
    """Heading, charts, samples, log, configuration and files of a run; a sentence in their place if it is gone."""
    try:
        return [
            heading(site, id),
            charts(site, id),
            samples(site, id, step),
            log(site, id),
            config_text(site, id),
            files(site, id),
        ]
    except (EquipoiseError, OSError) as error:
        if isinstance(error, OSError):
            file = Path(str(error.filename or "a file")).name
            error = f"{id}: {file} cannot be read ({error.strerror}). If the run is being changed, wait a moment."
        words = str(error)
        return [draw.notice(words, "bad"), "", "", "", "", ""]


def act(site: Site, id: str, what: str, workers: int) -> str:
    """Stops, resumes, samples or deletes a run; returns what to say.

    Raises:
        InputError: it cannot be done.
    """
    if not id:
        raise InputError("Choose a run first.")
    run = open_run(site, id)
    if what == "stop":
        return background.stop(run)
    if what == "resume":
        if not run.status().over:
            return f"{id}: is at work."
        first = background.ahead(run)
        background.resume(run, workers, in_turn=True)
        return f"{id}: continues {f'when {first.id} has ended' if first else 'in the background'}."
    if what == "sample":
        if run.status().state != "running":
            raise InputError(f"{id}: is not running, so it cannot draw samples now.")
        run.request("sample")
        return f"{id}: draws samples after the current step."
    background.delete(run)
    return f"{id}: deleted."


def build(site: Site, workers: int, forms: dict[str, Any], pipelines: gr.Radio, tabs: gr.Tabs, tab: gr.Tab) -> gr.State:
    """Draws the tab; returns the state that holds the chosen run's id."""
    gr.HTML("<h2>Runs</h2>")
    with gr.Row(elem_classes=["filters"]):
        words = gr.Textbox(label="Filter", placeholder="words of the id, pipeline or message", max_lines=1, scale=3)
        state = gr.Dropdown(["all", *STATES], value="all", label="State", interactive=True)
        sort = gr.Dropdown(list(SORTS), value=SORTS[0], label="Sort by", interactive=True)
    listing = gr.HTML(table(site), js_on_load=ON_RUN, elem_id="runs-table")
    chosen = gr.State("")
    seen = gr.State([])
    head = gr.HTML(heading(site, ""), js_on_load=ON_RUN, elem_id="run-head")
    message = gr.HTML(elem_id="run-message")
    with gr.Row(elem_classes=["actions"], visible=False) as buttons:
        stop = gr.Button("Stop (saves first)", size="md", elem_id="stop")
        sample = gr.Button("Sample now", size="md", elem_id="sample")
        resume = gr.Button("Resume", size="md", elem_id="resume")
        again = gr.Button("Duplicate into Launch", size="md", elem_id="duplicate")
        remove = gr.Button("Delete …", size="md", variant="stop", elem_id="delete")
    with gr.Row(elem_classes=["actions"], visible=False) as sure:
        which = gr.HTML()
        yes = gr.Button("Delete for good", size="md", variant="stop", elem_id="delete-yes")
        no = gr.Button("Keep it", size="md")
    with gr.Tabs(visible=False) as parts:
        with gr.Tab("Curves"):
            curves = gr.HTML()
        with gr.Tab("Samples"):
            step = Slider(0, 1, value=1, step=1, label="Step", interactive=True, visible=False)
            drawn = gr.HTML()
        with gr.Tab("Log"):
            text = gr.HTML()
        with gr.Tab("Configuration"):
            yaml = gr.Code(language="yaml", interactive=False, max_lines=30, show_label=False)
        with gr.Tab("Files"):
            listed = gr.HTML()
    end = gr.State(1)  # the slider's last step
    shown = [listing, head, curves, drawn, text, yaml, listed, stop, sample, resume]
    inputs = [words, state, sort, chosen, step, end, seen]

    def slide(id: str, at: float | None, end: int) -> tuple[int | None, int, Any]:
        """The step to show, the slider's end, and its update."""
        try:
            steps = sample_steps(open_run(site, id)) if id else []
            shown, first, last = followed(steps, at, end)
        except EquipoiseError:  # deleted since
            return None, end, gr.skip()
        if last == end and at is not None:
            return shown, end, gr.skip()
        value = last if shown is None else at
        return shown, last, gr.update(visible=len(steps) > 1, minimum=min(first, last - 1), maximum=last, value=value)

    def refresh(words: str, state: str, sort: str, id: str, at: float | None, end: int, seen: list[str]) -> list[Any]:
        at, last, slider = slide(id, at, end)
        parts = [table(site, words, state, sort, id), *detail(site, id, at), *possible(site, id)]
        outputs, digests = unchanged(parts, seen)
        return [*outputs, digests if digests != seen else gr.skip(), slider, last if last != end else gr.skip()]

    def select(words: str, state: str, sort: str, event: gr.EventData) -> list[Any]:
        return opened(words, state, sort, str(getattr(event, "id", "")))

    def restore(request: gr.Request) -> list[Any]:
        """The run that the page's address names, if it is there."""
        id = request.query_params.get("run", "")
        try:
            open_run(site, id)
        except EquipoiseError:
            return [gr.skip()] * (len(outputs) + 5)
        return opened("", "all", SORTS[0], id)  # as the filters are in a page that was just loaded

    def opened(words: str, state: str, sort: str, id: str) -> list[Any]:
        try:
            open_run(site, id)
        except EquipoiseError as error:
            return [*[gr.skip()] * len(outputs), draw.notice(str(error), "bad"), *[gr.skip()] * 4]
        _, last, slider = slide(id, None, 1)
        shown = [table(site, words, state, sort, id), *detail(site, id, None), *possible(site, id)]
        drawn, digests = unchanged(shown, [])
        many = gr.update(visible=True)
        return [*drawn, digests, slider, last, "", id, many, many, gr.update(visible=False)]

    def do(what: str) -> Any:
        def handler(id: str) -> list[Any]:
            try:
                said = draw.notice(act(site, id, what, workers), "good")
            except EquipoiseError as error:
                return [draw.notice(str(error), "bad"), gr.skip(), gr.skip(), gr.skip(), gr.update(visible=False)]
            if what == "delete":
                return [said, "", gr.update(visible=False), gr.update(visible=False), gr.update(visible=False)]
            return [said, gr.skip(), gr.skip(), gr.skip(), gr.update(visible=False)]

        return handler

    def duplicate(id: str) -> list[Any]:
        try:
            config = open_run(site, id).config()
            form = forms[config.pipeline]
        except (EquipoiseError, KeyError) as error:
            return [draw.notice(f"{id}: cannot be shown in Launch: {error}", "bad"), *[gr.skip()] * (count + 2)]
        updates = []
        for name, other in forms.items():
            mine = [gr.update(value=None), *form.fill(config)] if name == config.pipeline else None
            updates += mine or [gr.skip()] * (len(other.widgets) + 2)
        return ["", gr.update(selected="launch"), config.pipeline, *updates]

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    timer = gr.Timer(REFRESH)
    outputs = [*shown, seen, step, end]
    timer.tick(refresh, inputs, outputs, trigger_mode="once", **private)
    tab.select(refresh, inputs, outputs, **private)  # what it shows until then is of when the server started
    moved = [words.change, state.input, sort.input, step.input]
    gr.on(moved, refresh, inputs, outputs, trigger_mode="always_last", **private)
    all_of_it = [*outputs, message, chosen, buttons, parts, sure]
    page = Context.root_block
    assert page is not None
    page.load(restore, None, all_of_it, **private)
    for source in (listing, head):
        source.select(select, [words, state, sort], all_of_it, trigger_mode="multiple", **private)
    told = [message, chosen, buttons, parts, sure]
    for button, what in ((stop, "stop"), (resume, "resume"), (sample, "sample"), (yes, "delete")):
        button.click(do(what), chosen, told, **private).then(refresh, inputs, outputs, **private)
    asked = "<p>Delete <b>{}</b> with all its files? It cannot be undone.</p>"
    yes.click(None, None, None, js="() => equipoise.at({run: ''})", api_visibility="private")
    remove.click(lambda id: [gr.update(visible=True), asked.format(esc(id))], chosen, [sure, which], **private)
    no.click(lambda: gr.update(visible=False), None, sure, **private)
    count = sum(len(form.widgets) + 2 for form in forms.values())
    fields = [widget for form in forms.values() for widget in (form.preset, *form.widgets, form.options)]
    again.click(duplicate, chosen, [message, tabs, pipelines, *fields], **private).then(
        None, None, None, js="() => equipoise.at({tab: 'Launch'})", api_visibility="private"
    )
    return chosen
