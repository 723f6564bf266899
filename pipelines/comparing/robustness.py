"""How forgiving an optimizer is of the learning rate: its usable range, in decades. The one definition of it.

Every cell has a score, higher is better, and the untouched base has one. The line is drawn at

    base + USABLE · (best − base)

where *best* is the best score of any cell in the comparison, so every optimizer has to clear the same bar. Where no
cell gains at least GAIN over the base, nothing worked, and there is no line: noise would clear it. Scores are joined by
straight lines over log₁₀(learning rate); an optimizer's usable range is the unbroken stretch above the line that holds
its own best rate. A stretch that reaches the end of what was tried is open there: "at least". A cell that diverged
or draws mostly broken pictures is never usable, whatever its score: see `Comparison.counted`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

USABLE = 0.75  # share of the best gain over the base that a rate must reach to count as usable
GAIN = 0.02  # in units of the score: two pictures in a hundred, or 2 % of the base's loss; below that is noise


@dataclass(frozen=True)
class Point:
    rate: float  # learning rate
    score: float  # higher is better


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


def shown_rate(rate: float, digits: int = 6) -> str:
    """A learning rate as people write it, 1e-4 or 1.5e-4: to `digits` after the point, without zeros at the end."""
    mantissa, exponent = f"{rate:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def usable_range(points: Sequence[Point], line: float) -> UsableRange | None:
    """The learning rates that work, or None where none does.

    Args:
        points: One optimizer's cells, one per learning rate, in any order. Scores that are not finite are failures.
        line: The score to reach, from `threshold`.
    """
    ordered = sorted(points, key=lambda point: point.rate)
    scores = [point.score if math.isfinite(point.score) else -math.inf for point in ordered]
    if not ordered or max(scores) < line:
        return None
    top = scores.index(max(scores))
    first, last = top, top
    while first > 0 and scores[first - 1] >= line:
        first -= 1
    while last + 1 < len(ordered) and scores[last + 1] >= line:
        last += 1
    low = ordered[first].rate if first == 0 else _crossing(ordered[first - 1], ordered[first], line)
    high = ordered[last].rate if last + 1 == len(ordered) else _crossing(ordered[last + 1], ordered[last], line)
    return UsableRange(low, high, first == 0, last + 1 == len(ordered))


def _crossing(outside: Point, inside: Point, line: float) -> float:
    """The rate between two cells at which the straight line between their scores meets the bar."""
    if not math.isfinite(outside.score) or inside.score == line:
        return inside.rate
    share = (inside.score - line) / (inside.score - outside.score)
    return 10 ** (math.log10(inside.rate) + share * (math.log10(outside.rate) - math.log10(inside.rate)))
