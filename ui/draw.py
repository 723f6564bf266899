"""Pieces of HTML and SVG. Every text that comes from a file or a user is escaped here and nowhere else."""

import html
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from equipoise.pipelines.comparing.curve import ticks
from equipoise.pipelines.comparing.robustness import shown_rate

INKS = ("var(--line-1)", "var(--line-2)", "var(--line-3)", "var(--line-4)", "var(--line-5)", "var(--line-6)")
_DECADES = 100  # beyond such a ratio a chart is logarithmic in any case
_SAME = 1e-4  # a smaller share cannot be told apart beside the axis
_SMALL = 1e-3  # below which numbers are rather read with exponents, as rates are
_LETTER = 8.0  # units of a chart that a digit takes across
_BESIDE = 58.0  # units of a chart that the numbers beside it have at least
_WIDTH, _HEIGHT, _MARGIN, _FOOT = 520, 220, 12, 26  # of a chart; the margin is that above and on the right
_POINTS = 400  # of a line; more cannot be told apart on a screen
_STEPS = {"+": (2, "fewer steps"), "−": (0.5, "more steps"), "All": (0, "all steps")}  # label → (factor, words)
_BUTTON = '<button data-steps="{0}" aria-label="{1}" title="{1}">{2}</button>'
_ZOOM = f'<div class="steps">{"".join(_BUTTON.format(*about, label) for label, about in _STEPS.items())}</div>'


def esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def url(name: str) -> str:
    """Where the server has a file of the runs folder."""
    return esc(f"/runs-file/{name}".replace("%", "%25").replace("+", "%2B").replace(",", "%2C").replace("=", "%3D"))


def breakable(text: object) -> str:
    """A name of several parts, which may be broken between them where there is little room."""
    return re.sub(r"(?<=[=,_/])(?=\w)", "<wbr>", esc(text))


def notice(text: str, kind: str = "info", about: Callable[[str], str] | None = None) -> str:
    """A sentence in the page, or several; kind info, good or bad. `about`: a line → the id of its field, or ""."""
    known = {line: about(line) if about else "" for line in text.splitlines() if line.strip()}
    lines = "".join(f"<li{f' data-field={id!r}' if id else ''}>{esc(line)}</li>" for line, id in known.items())
    return f'<ul class="notice {kind}" role="{"alert" if kind == "bad" else "status"}">{lines}</ul>' if lines else ""


def head(title: str, lead: str = "") -> str:
    """A tab's heading, and a sentence or two of HTML on what it is for."""
    return f"<h2>{esc(title)}</h2>" + (f"<p class='lead'>{lead}</p>" if lead else "")


def empty(title: str, text: str) -> str:
    """What is shown where there is nothing yet, with what to do next."""
    return f'<div class="empty-state"><strong>{esc(title)}</strong><p>{esc(text)}</p></div>'


def span(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds:.1f} s" if seconds < 10 else str(timedelta(seconds=round(seconds)))


def number(value: float | None, digits: int = 4) -> str:
    """One for people, with exponents as rates have them: 1e-5."""
    return "" if value is None else re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.{digits}g}")


def facts(pairs: Mapping[str, object]) -> str:
    """Names and values beside each other."""
    inside = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in pairs.items())
    return f"<dl class='facts'>{inside}</dl>"


def chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    log: bool = False,
    smooth: float = 0.0,
    inks: Mapping[str, str] | None = None,
) -> str:
    """Lines over steps as SVG; on a logarithmic axis where asked for, or decades apart, and everything is positive.

    Args:
        title: of the chart.
        lines: name → (step, value).
        log: whether the axis is logarithmic, if it can be.
        smooth: weight of what came before, below 1; the lines as they are measured lie pale behind the smoothed ones.
        inks: name → colour; of all lines, or of none.
    """
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in lines.items()}
    values = [y for points in finite.values() for _, y in points]
    if not values:
        return ""
    plane = _plane(finite, (log or max(values) > _DECADES * abs(min(values))) and min(values) > 0)
    about = f'data-plot="{esc(json.dumps(plane.plot))}" tabindex="0" role="img" aria-label="{esc(title)}"'
    drawn = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" {about}>', *plane.marked()]
    colours = inks or {name: _ink(index, len(finite)) for index, name in enumerate(finite)}
    for name, points in finite.items():
        line, shown = f'data-line="{esc(name)}"', smoothed(points, smooth) if smooth else points
        ink = f'style="stroke:{colours[name]}" {line}'
        if smooth:
            drawn.append(f'<polyline class="raw" {plane.path(points)} {ink}/>')
        drawn.append(f"<polyline {plane.path(shown)} {ink}/>")
        for x, y in shown[-1:]:  # all there is to see of what was measured once
            at = f'cx="{plane.across(x):.1f}" cy="{plane.down(y):.1f}"'
            drawn.append(f'<circle {at} r="3" style="fill:{colours[name]}" {line}/>')
    caption = f"<figcaption>{esc(title)}</figcaption>{_ZOOM}"
    inside = f"{caption}{''.join(drawn)}</svg><p>{_legend(finite, colours)}</p>"
    return f'<figure class="chart" data-chart="{esc(title)}">{inside}</figure>'


@dataclass(frozen=True)
class _Plane:
    """Where on a chart a step and a value are, in its units."""

    first: float  # step
    last: float
    low: float  # on the scale of the values
    high: float
    log: bool
    left: float

    @property
    def plot(self) -> dict[str, float]:
        """What the browser needs to know of it, to read and to zoom it."""
        sides = {"right": _WIDTH - _MARGIN, "top": _MARGIN, "bottom": _HEIGHT - _FOOT}
        beside = {"letter": _LETTER, "least": _BESIDE}
        return {**asdict(self), **sides, **beside, "width": _WIDTH, "height": _HEIGHT}

    def across(self, x: float) -> float:
        return self.left + (x - self.first) / ((self.last - self.first) or 1) * (_WIDTH - self.left - _MARGIN)

    def down(self, y: float) -> float:
        share = ((math.log10(y) if self.log else y) - self.low) / (self.high - self.low)
        return _HEIGHT - _FOOT - share * (_HEIGHT - _MARGIN - _FOOT)

    def marked(self) -> Iterator[str]:
        """The numbers beside and below it."""
        values = marks(self.low, self.high, self.log)
        for value, words in zip(values, labels(values, self.log), strict=True):
            y = self.down(value)
            yield f'<line class="rule" x1="{self.left}" x2="{_WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{self.left - 6}" class="beside" y="{y + 4:.1f}" text-anchor="end">{words}</text>'
        for x, anchor in {self.first: "start", self.last: "end"}.items():
            about = f'x="{self.across(x):.1f}" class="below" y="{_HEIGHT - 8}" text-anchor="{anchor}"'
            yield f"<text {about}>{x:.12g}</text>"

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """A line's points, and the steps and values that they stand for."""
        few = thinned(points, 2 * len(points) // _POINTS)
        few += points[-1:] if few[-1:] != list(points[-1:]) else []
        places = " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in few)
        return f'points="{places}" data-values="{" ".join(f"{x:.12g}:{y:.5g}" for x, y in few)}"'


def _plane(lines: Mapping[str, Sequence[tuple[float, float]]], log: bool) -> _Plane:
    """One that all lines fit on, with room for the numbers beside it, which are never cut off."""
    points = [point for some in lines.values() for point in some]
    scaled = [math.log10(y) if log else y for _, y in points]
    low, high = min(scaled), max(scaled)
    if high - low <= _SAME * (1.0 if log else max(abs(low), abs(high))):
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    longest = max(map(len, labels(marks(low, high, log), log)), default=0)
    steps = [x for x, _ in points]
    return _Plane(min(steps), max(steps), low, high, log, max(_BESIDE, _LETTER * longest + 14))


def _legend(lines: Mapping[str, Sequence[tuple[float, float]]], inks: Mapping[str, str]) -> str:
    """Each line's colour, name and last value."""
    return "".join(
        f'<button data-line="{esc(label)}" aria-pressed="true" title="Hide it, or show it again">'
        f'<i style="background:{inks[label]}"></i>{breakable(label)} <b>{number(points[-1][1])}</b></button>'
        for label, points in lines.items()
        if points
    )


def _ink(index: int, count: int) -> str:
    """A line's colour among so many, each another one."""
    return INKS[index] if count <= len(INKS) else f"hsl({360 * index / count:.0f} 60% {(40, 58)[index % 2]}%)"


def smoothed(points: Sequence[tuple[float, float]], weight: float) -> list[tuple[float, float]]:
    """The running mean in which what came before has that weight; the first points are no lower for it."""
    found, total, norm = [], 0.0, 0.0
    for step, value in points:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        found.append((step, total / norm))
    return found


def thinned(points: Sequence[tuple[float, float]], size: int) -> list[tuple[float, float]]:
    """The lowest and the highest of each `size` neighbours, so that no spike is lost; all where `size` is 2 or less."""
    if size <= 2:
        return list(points)
    groups = (points[index : index + size] for index in range(0, len(points), size))
    return [p for group in groups for p in sorted({f(group, key=_height) for f in (min, max)})]


def _height(point: tuple[float, float]) -> float:
    return point[1]


def marks(low: float, high: float, log: bool) -> list[float]:
    """The values beside an axis from `low` to `high`, which are exponents where it is logarithmic.

    page.js has the same rule, and that of `labels`, for what it lays out anew.
    """
    if not log:
        return ticks(low, high)
    decades = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, math.floor((high - low) / 4 + 0.5))
    for digits in ((1,), (1, 3), (1, 2, 5)):  # few decades want marks between them
        found = [float(f"{d}e{n}") for n in decades if n % every == 0 for d in digits]
        if len(inside := [value for value in found if low - 1e-9 <= math.log10(value) <= high + 1e-9]) > 2:
            return inside
    return [float(f"{value:.3g}") for value in ticks(10**low, 10**high)]


def labels(values: Sequence[float], log: bool) -> list[str]:
    """What marks are called: on a logarithmic axis all have exponents where one has, or is below a thousandth."""
    plain = [number(value) for value in values]
    several = log and any("e" in words or value < _SMALL for words, value in zip(plain, values, strict=True))
    return [shown_rate(value, 3) for value in values] if several else plain


def records(text: str, most: int = 200) -> list[dict[str, Any]]:
    """The records of lines of JSON, without such as are none or only half written."""
    found = []
    for line in text.splitlines()[:most]:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


def table(text: str) -> str:
    """Lines of JSON as a table, a column for each key; of paths only the files' names."""
    found = records(text)
    keys = list(dict.fromkeys(key for record in found for key in record))
    head = "".join(f"<th>{breakable(key)}</th>" for key in keys)
    shown = {"score": _mark}
    cells = [[shown.get(key, _value)(record.get(key)) for key in keys] for record in found]
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _mark(score: object) -> str:
    """A score as a tick or a cross where it is all or nothing."""
    words = {1.0: ("right", "✓"), 0.0: ("wrong", "✗")}
    kind, mark = words.get(score, ("", _value(score))) if isinstance(score, float) else ("", _value(score))
    return f"<span class='{kind}'>{mark}</span>"


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, str):
        return esc(value.rpartition("/")[2] if value.startswith("/") else value.strip())
    return "" if value is None else esc(number(value)) if isinstance(value, float) else esc(value)
