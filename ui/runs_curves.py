"""The curves of a run: its metrics, read as they grow, and drawn."""

import math
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from posixpath import commonpath

from equipoise.errors import InputError
from equipoise.pipelines.comparing.robustness import shown_rate
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.run import Run, metric_lines
from equipoise.ui import draw
from equipoise.ui.runs import open_run
from equipoise.ui.safety import Site

MOST_READ = 200  # runs whose curves are kept in memory
MOST_POINTS = 8_000  # of a curve; of a longer one, the lowest and the highest of so many steps that it has no more
Curves = dict[str, list[tuple[float, float]]]
_PIECE = 2**20  # bytes of metrics that are read at a time
_NOT_CURVES = ("step", "time", "seconds")
_GROUP = re.compile(r"val_[^_]+|[^_]+")  # names that begin so share a chart
_SYMBOLS = {"kappa": "κ", "joint_weight": "α, the joint gradient's weight", "alpha": "α"}  # as papers write
_SECONDS = ("balancing", "loading")
_RATE = re.compile(r"(?:^|(?<=/)|,)(?:optimizer\.)?learning_rate=([^,]*)")  # in the name of a sweep's cell
HUES = (174, 25, 213, 285, 42)  # those of draw.INKS, in degrees
_LOG_SCALE = ("loss", "rate")  # what spans decades


@dataclass(frozen=True)
class Wanted:
    """How curves are drawn."""

    smooth: float = 0.0  # weight of what came before, below 1
    log: bool = False  # every axis, where it can be
    metric: str = "loss"  # of which several runs are shown
    beside: tuple[str, ...] = ()  # ids of runs and sweeps that are shown with this one


MEASURED = Wanted()  # as they are measured


def charts(site: Site, id: str, wanted: Wanted = MEASURED) -> str:
    """A run's metrics over its steps, those of one kind in one chart; of several runs, and of a sweep, one metric."""
    if not id:
        return ""
    run = open_run(site, id)
    if wanted.beside or run.status().kind == "sweep":
        return _of_several(site, run, wanted)
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
        draw.chart(
            _title(group, some),
            {name: lines[name] for name in some},
            log=wanted.log or group in _LOG_SCALE,
            smooth=0.0 if group == "rate" else wanted.smooth,  # which has no noise
        )
        for group, some in groups.items()
    ]
    return f"<div class='charts'>{''.join(drawn)}</div>"


def _of_several(site: Site, run: Run, wanted: Wanted) -> str:
    shown = together_with(site, run, wanted.beside)
    measured = {name: read_curves(one) for name, one in shown.items()}
    lines = {name: some.get(wanted.metric, []) for name, some in measured.items()}
    if not any(measured.values()) and not all(one.status().over for one in shown.values()):
        return draw.empty("Nothing measured yet", f"Curves of {wanted.metric[:60]} appear after the first steps.")
    if not any(lines.values()):
        words = f"None of them has measured {wanted.metric[:60]}; choose another metric."
        return draw.empty("Nothing to show", words)
    called = cell_names(shown)
    title = f"{_title(wanted.metric, [wanted.metric])} of each {'run' if wanted.beside else 'cell'}"
    log = wanted.log or wanted.metric in _LOG_SCALE
    colours = {called[name]: ink for name, ink in inks(shown).items()}
    lines = {called[name]: points for name, points in lines.items()}
    drawn = draw.chart(title, lines, log=log, smooth=wanted.smooth, inks=colours)
    return f"<div class='charts wide'>{drawn}</div>"


def cell_names(names: Iterable[str]) -> dict[str, str]:
    """Sweeps' cells as comparisons call them, `adamw at 3e-3`, by their folders' names; others by their own."""
    found = {name: _cell_name(name) for name in names}
    return found if len(set(found.values())) == len(found) else {name: name for name in found}


def _cell_name(name: str) -> str:
    if not (rate := _RATE.search(name)):
        return name
    try:
        at = shown_rate(float(rate[1]))
    except ValueError:
        return name
    rest = re.sub(r"(^|[,/])optimizer=", r"\1", _RATE.sub("", name)).replace("+", " ").strip(",")
    return f"{rest} at {at}" if rest else f"learning rate {at}"


def together_with(site: Site, run: Run, beside: Sequence[str] = ()) -> dict[str, Run]:
    """A run, or a sweep's cells, and others beside them, by a name for each."""
    chosen = [run]
    for id in beside:
        with suppress(InputError):  # deleted since
            chosen.append(open_run(site, id))
    found = [one for some in chosen for one in (sweeps.cells(some) if some.status().kind == "sweep" else [some])]
    short = Counter(one.folder.name for one in found)
    return {one.folder.name if short[one.folder.name] == 1 else one.id: one for one in found}


def metrics(site: Site, id: str, beside: Sequence[str] = ()) -> list[str]:
    """What the runs have measured, by name."""
    if not id:
        return ["loss"]
    found = together_with(site, open_run(site, id), beside).values()
    return list(dict.fromkeys(["loss", *(name for run in found for name in read_curves(run))]))


def inks(runs: Mapping[str, Run]) -> dict[str, str]:
    """A colour for each run: one hue for those that differ in the learning rate alone, from light to dark by it."""
    rows: dict[str, list[tuple[float, str]]] = {}
    for name, run in runs.items():
        rate = run.status().learning_rate
        rows.setdefault(_RATE.sub("", name), []).append((math.inf if rate is None else rate, name))
    found = {}
    for index, some in enumerate(rows.values()):
        for place, (_, name) in enumerate(sorted(some)):
            light = 72 - 34 * place / max(1, len(some) - 1) if len(some) > 1 else 50
            found[name] = f"hsl({_hue(index, len(rows)):.0f} 65% {light:.0f}%)"
    return found


def _hue(index: int, count: int) -> float:
    """A row's hue, in degrees: as far as they go that of the line which the tab Compare draws of it."""
    return HUES[index] if count <= len(HUES) else (HUES[0] + 360 * index / count) % 360


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
    end: bytes = b""  # what stood before there, by which a file that has grown is known from another one
    lines: dict[str, "_Curve"] = field(default_factory=dict)
    busy: threading.Lock = field(default_factory=threading.Lock)  # several pages may be open


def read_curves(run: Run) -> Curves:
    """What a run measured: name → (step, value). Of a file that has grown only what is new is read, in pieces."""
    with _reading:
        known = _read[run.folder] = _read.pop(run.folder, _Read())  # as the one used last
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
    units = {"memory": ", GB", "load": ", %"}
    unit = ", seconds" if title in _SECONDS else units.get(title.partition("_")[0], "")
    return symbol or title.replace("val_", "validation ").replace("_", " ") + unit
