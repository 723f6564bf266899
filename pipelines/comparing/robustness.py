"""How forgiving an optimizer is of the learning rate: its usable range, in decades. The one definition of it.

Every cell has a score, higher is better, and the untouched base has one. A rate is usable where it learnt enough and
kept enough. It learnt enough where its score reaches the line

    base + USABLE · (best − base)

where *best* is the best score of any cell in the comparison, so every optimizer has to clear the same bar. Where no
cell gains at least GAIN over the base, nothing worked, and there is no line: noise would clear it. It kept enough where
what is left of what the base knew before reaches KEPT · (what the untouched base has of it). A comparison that measures
nothing of the kind, or whose base has nothing to lose, has no such line, and judges by what was learnt alone.

Scores, and what was kept, are joined by straight lines over log₁₀(learning rate); an optimizer's usable range is the
unbroken stretch above both lines that holds its own best usable rate, and ends where the first of them is crossed. A
stretch that reaches the end of what was tried is open there: "at least". A cell that diverged or draws mostly broken
pictures is never usable, whatever its score: see `Comparison.counted`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

USABLE = 0.75  # share of the best gain over the base that a rate must reach to count as usable
KEPT = 0.75  # share of what the base kept, untouched, that a rate must keep
GAIN = 0.02  # in units of the score: two pictures in a hundred, or 2 % of the base's loss; below that is noise


@dataclass(frozen=True)
class Point:
    rate: float  # learning rate
    score: float  # higher is better
    kept: float = math.nan  # of what the base knew before, higher is better; nan where it is not measured


@dataclass(frozen=True)
class UsableRange:
    low: float  # learning rate
    high: float
    open_low: bool  # nothing lower was tried
    open_high: bool  # nothing higher was tried

    @property
    def decades(self) -> float:
        return math.log10(self.high / self.low)

    def __str__(self) -> str:
        if self.low == self.high and self.open_low and self.open_high:
            return f"{shown_rate(self.low, 2)} (no other rate was tried)"
        at_least = "at least " if self.open_low or self.open_high else ""
        return f"{shown_rate(self.low, 2)} to {shown_rate(self.high, 2)} ({at_least}{self.decades:.1f} decades)"


def threshold(base: float, best: float) -> float | None:
    """The score that counts as usable, or None where even the best gains too little over the base to tell."""
    return base + USABLE * (best - base) if best - base >= GAIN else None


def kept_threshold(base: float) -> float | None:
    """What a rate must keep, or None where the untouched base has nothing to lose, or it is not measured."""
    return KEPT * base if math.isfinite(base) and base > 0 else None


def shown_rate(rate: float, digits: int = 6) -> str:
    """A learning rate as people write it, 1e-4 or 1.5e-4: to `digits` after the point, without zeros at the end."""
    mantissa, exponent = f"{rate:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def usable(point: Point, line: float, kept_line: float | None = None) -> bool:
    """Whether a rate works. Neither a score nor a `kept` that is not finite ever does.

    Args:
        line: The score to reach, from `threshold`.
        kept_line: What is to be kept, from `kept_threshold`; None where what was learnt decides alone.
    """
    return all(math.isfinite(value) and value >= bar for value, bar in _measures(point, line, kept_line))


def merit(point: Point, kept_line: float | None) -> tuple[float, float]:
    """What usable rates are ordered by: their scores, and of equal ones what they kept, where that is judged."""
    return point.score, 0.0 if kept_line is None else point.kept


def reach(point: Point, base: float, line: float, kept_line: float | None = None) -> float:
    """How near a rate is to working: 1 where it just does, by whichever of the two it has less of.

    Args:
        base: The untouched base's score.
    """
    shares = [(point.score - base) / (line - base), *([point.kept / kept_line] if kept_line else [])]
    return min(share if math.isfinite(share) else -math.inf for share in shares)


def usable_range(points: Sequence[Point], line: float, kept_line: float | None = None) -> UsableRange | None:
    """The learning rates that work, or None where none does.

    Args:
        points: One optimizer's cells, one per learning rate, in any order.
        line: As for `usable`.
        kept_line: As for `usable`.
    """
    ordered = sorted(points, key=lambda point: point.rate)
    works = [usable(point, line, kept_line) for point in ordered]
    if not any(works):
        return None
    top = max((index for index, it in enumerate(works) if it), key=lambda index: merit(ordered[index], kept_line))
    first, last = top, top
    while first > 0 and works[first - 1]:
        first -= 1
    while last + 1 < len(ordered) and works[last + 1]:
        last += 1
    low = ordered[first].rate if first == 0 else _crossing(ordered[first - 1], ordered[first], line, kept_line)
    end = last + 1 == len(ordered)
    high = ordered[last].rate if end else _crossing(ordered[last + 1], ordered[last], line, kept_line)
    return UsableRange(low, high, first == 0, end)


def _crossing(outside: Point, inside: Point, line: float, kept_line: float | None) -> float:
    """The rate between two cells at which the first of the straight lines between them meets its bar."""
    if outside.score < line and not math.isfinite(outside.kept):
        kept_line = None  # a run that failed before it was known: its score ends the range
    pairs = zip(_measures(outside, line, kept_line), _measures(inside, line, kept_line), strict=True)
    share = min(_share(there, here, bar) for (there, bar), (here, _) in pairs)
    if share == 0:
        return inside.rate
    return 10 ** (math.log10(inside.rate) + share * (math.log10(outside.rate) - math.log10(inside.rate)))


def _share(outside: float, inside: float, bar: float) -> float:
    """How far it is from the inside to where the bar is met, of the whole way; 1 where it is not met before the end."""
    if not math.isfinite(outside):
        return 0.0
    return (inside - bar) / (inside - outside) if outside < bar else 1.0


def _measures(point: Point, line: float, kept_line: float | None) -> list[tuple[float, float]]:
    """What a rate is judged by, each with the bar that it has to reach."""
    return [(point.score, line), *([] if kept_line is None else [(point.kept, kept_line)])]
