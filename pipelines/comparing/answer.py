"""What a comparison comes to, in one sentence: the best rate, what it learnt and kept, its range, and what to try."""

import math
from collections.abc import Sequence

from equipoise.pipelines.comparing.comparison import WORKS, Comparison, short
from equipoise.pipelines.comparing.robustness import GAIN, Point, usable

_BEYOND = 10.0  # how much farther to go where one rate alone was tried


def answer(comparison: Comparison) -> str:
    """The sentence; nothing where nothing is judged."""
    if not comparison.judged:
        return ""
    if (found := comparison.best) is None:
        more = _where_nothing_was_learnt(comparison)
        return f"No gain of {GAIN:.0%} or more over the base: smaller ones are noise{more}."
    row, point = found
    works = comparison.verdict(row, point.rate) == WORKS
    reached = comparison.ranges()[row]
    said = f"{'Best' if works else 'Nearest'}: {row} at {comparison.shown(point.rate)}: {_figures(comparison, point)}"
    if not works:
        said = f"No {comparison.noun} is usable. {said}, {comparison.verdict(row, point.rate)}"
    elif reached and reached.low < reached.high:
        ends = [comparison.shown(float(f"{end:.2g}")) for end in (reached.low, reached.high)]
        open_end = "at least " if reached.open_low or reached.open_high else ""  # as the table of ranges has it
        said += f"; usable {open_end}from {ends[0]} to {ends[1]}"
    return f"{said}{_next(comparison, row, point)}."


def _figures(comparison: Comparison, point: Point) -> str:
    if comparison.kept_line is None or not math.isfinite(point.kept):
        return f"score {point.score:.0%}"
    return f"{point.score:.0%} learnt, {point.kept:.0%} {short(comparison.kept)}"


def _where_nothing_was_learnt(comparison: Comparison) -> str:
    """The rate to try next, by the first row: above the highest that did not fail, and below one that did."""
    row = comparison.rows[0]
    rates = [point.rate for point in comparison.points(row)]
    sound = [rate for rate in rates if comparison.verdict(row, rate).endswith("too little")]
    if not sound:
        return _try(comparison, rates[0] / _ratio(rates))
    above = [rate for rate in rates if rate > sound[-1]]
    return _try(comparison, math.sqrt(sound[-1] * above[0]) if above else sound[-1] * _ratio(rates))


def _next(comparison: Comparison, row: str, point: Point) -> str:
    """The rate of this row to try next, as the end of the sentence; nothing where the best has others on both sides.

    Beyond the end where the best stands, upwards where too little was learnt and downwards where too little was kept;
    and between two rates of which one learnt too little and the other kept too little.
    """
    points, bar, line = comparison.points(row), comparison.kept_line, comparison.line
    rates = [one.rate for one in points]
    at, ratio = rates.index(point.rate), _ratio(rates)
    learnt = line is not None and point.score >= line
    works = line is not None and usable(point, line, bar)
    lower, higher = learnt and at == 0, (works or not learnt) and at == len(points) - 1
    if lower or higher:
        return _try(comparison, *[point.rate / ratio] * lower, *[point.rate * ratio] * higher)
    return "" if works else _try(comparison, math.sqrt(point.rate * rates[at - 1 if learnt else at + 1]))


def _ratio(rates: Sequence[float]) -> float:
    return rates[1] / rates[0] if len(rates) > 1 else _BEYOND


def _try(comparison: Comparison, *rates: float) -> str:
    return f"; try {' and '.join(comparison.shown(float(f'{rate:.2g}')) for rate in rates)}"
