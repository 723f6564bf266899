"""The robustness curve of a comparison: score, and what was kept, against learning rate."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from equipoise.pipelines.comparing.comparison import Comparison, short
from equipoise.pipelines.comparing.robustness import shown_rate

Spot = tuple[float, float, float, float]  # of a line: learning rate, value, and where that is, in units of the picture
_BESIDE = 3.0  # units between lines that would lie upon each other
_APART, _ROW = 44, 14  # units of the curve that a rate's number takes across, and a word down
LINES = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a")  # colours of the rows, from the first on


def draw_curve(comparison: Comparison, colours: Sequence[str] = LINES) -> str:
    """The robustness curve as SVG: score against learning rate, a line per row, and where that is judged a thin dashed
    one for what it kept; the bars to clear are dashed, and `curve_words` says which is which."""
    width, height, left, right, top, bottom = 720, 300, 60, 58, 16, 44
    if not comparison.judged:  # as with questions of one's own
        return ""
    lines, bars = _lines(comparison), _bars(comparison)
    values = [value for line in lines for _, value in line.spots] + [value for _, _, value in bars]
    low, high = min([*values, 0.0]), max([*values, 0.01])
    first, last = math.log10(comparison.rates[0]), math.log10(comparison.rates[-1])

    def x(rate: float) -> float:
        share = (math.log10(rate) - first) / (last - first) if last > first else 0.5
        return left + share * (width - left - right)

    def y(score: float) -> float:
        return height - bottom - (score - low) / (high - low) * (height - top - bottom)

    drawn = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_title(comparison)}">']
    written = -math.inf
    for rate in comparison.rates:
        if x(rate) - written >= _APART:  # where rates are many, some go without their number
            written = x(rate)
            drawn.append(
                f'<text x="{written:.1f}" y="{height - 24}" text-anchor="middle">{comparison.shown(rate)}</text>'
            )
    for value in ticks(low, high):
        drawn.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
        drawn.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
    axis = html.escape(comparison.column)
    drawn.append(f'<text x="{(left + width) / 2}" y="{height - 4}" text-anchor="middle">{axis}</text>')
    above = math.inf  # where the words below are: two may be near each other
    for kind, label, value in bars:
        at, above = y(value), min(y(value), above - _ROW)
        drawn.append(f'<line class="{kind}" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text x="{width - right + 8}" y="{above + 4:.1f}">{label}</text>')
    taken: set[tuple] = set()  # stretches of the lines drawn so far
    for line in lines:
        spots = [(rate, value, x(rate), y(value)) for rate, value in line.spots]
        drawn.append(line.drawn(beside(spots, taken), line_colour(line.index, colours)))
    return "".join([*drawn, "</svg>"])


def beside(spots: list[Spot], taken: set[tuple]) -> list[Spot]:
    """A line, as far below itself as it must be to be told from the lines whose stretches are `taken`.

    Lines that cross or meet in a point stay where they are; only such that share a stretch between two rates move.
    """
    down = 0.0
    while (mine := _stretches(spots, down)) & taken:
        down += _BESIDE
    taken |= mine
    return [(rate, value, x, y + down) for rate, value, x, y in spots]


def _stretches(spots: list[Spot], down: float) -> set[tuple]:
    corners = [(round(x), round(y + down)) for _, _, x, y in spots]
    return set(pairwise(corners)) if len(corners) > 1 else {(corner, corner) for corner in corners}


def _title(comparison: Comparison) -> str:
    more = "" if comparison.kept_line is None else f" and {short(comparison.kept)}"
    return f"score{html.escape(more)} against {html.escape(comparison.column)}"


@dataclass(frozen=True)
class _Line:
    """One line of the curve."""

    row: str
    index: int  # of the row, which gives the colour
    name: str  # of what was kept; "" for the score
    spots: list[tuple[float, float]]  # learning rate, value

    def drawn(self, spots: list[Spot], colour: str) -> str:
        """As SVG."""
        kind = ' class="kept"' if self.name else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for _, _, x, y in spots)
        drawn = [f'<polyline{kind} points="{path}" stroke="{colour}"/>']
        for rate, value, x, y in spots:
            said = f"{self.name} {value:.3f}".strip()
            title = f"<title>{html.escape(self.row)} at {shown_rate(rate)}: {html.escape(said)}</title>"
            size = 2.5 if self.name else 4
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}">{title}</circle>')
        return "".join(drawn)


def _lines(comparison: Comparison) -> list[_Line]:
    """The scores of every row, and what it kept where that is judged."""
    found = []
    for index, row in enumerate(comparison.rows):
        points = comparison.points(row)
        found.append(_Line(row, index, "", [(p.rate, p.score) for p in points if math.isfinite(p.score)]))
        if comparison.kept_line is not None:
            name = short(comparison.kept)
            found.append(_Line(row, index, name, [(p.rate, p.kept) for p in points if math.isfinite(p.kept)]))
    return found


def _bars(comparison: Comparison) -> list[tuple[str, str, float]]:
    """The levels of the curve from the lowest on: its kind, its label and its value."""
    bar = comparison.kept_line
    bars = [
        ("base", "base", comparison.base.score),
        ("usable", "usable" if bar is None else "learnt", comparison.line),
        ("kept", "kept", bar),
    ]
    found = [(kind, label, value) for kind, label, value in bars if value is not None and math.isfinite(value)]
    return sorted(found, key=lambda bar: bar[2])


def curve_words(comparison: Comparison) -> str:
    """What the lines of the curve are, where each row has two."""
    if comparison.kept_line is None or not comparison.judged:
        return ""
    name = short(comparison.kept)
    return (
        f"Lines: the score. Thin dashed lines: {name}. A usable {comparison.noun} reaches both levels, learnt and kept."
    )


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, at equal distances, not many more or fewer than `about`."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(some for some in (1, 2, 5, 10) if some * unit >= rough * 0.99)
    return [float(f"{index * step:.12g}") for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_colour(index: int, colours: Sequence[str] = LINES) -> str:
    """The colour of a row's line in the curve."""
    return colours[index % len(colours)]
