"""The sentence that a comparison opens with."""

import math
from pathlib import Path

import pytest

from equipoise.pipelines.comparing.answer import answer
from equipoise.pipelines.comparing.comparison import Cell, Comparison

GAIN = "No gain of 2% or more over the base: smaller ones are noise"


def compared(rows: dict[str, dict[float, tuple]], base: tuple = (0.0, 1.0), kept: bool = True) -> Comparison:
    """Rows → rate → (score, kept), or a state in place of them."""

    def cell(row: str, rate: float, values: tuple) -> Cell:
        state = values[0] if isinstance(values[0], str) else "done"
        figures = dict(zip(("score", "kept"), values, strict=False)) if state == "done" else {}
        return Cell(f"{row}-{rate:g}", row, rate, 0, state, metrics=figures)

    cells = [cell(row, rate, values) for row, tried in rows.items() for rate, values in tried.items()]
    return Comparison("c", Path(), [], "s", cell("base", math.nan, base), cells, kept="kept" if kept else "")


@pytest.mark.parametrize(
    ("tried", "said"),
    [
        (
            {1e-3: (0, 1.0), 1e-2: (0.8, 1.0), 1e-1: (0.5, 0.9)},
            "Best: a at 1e-2: 80% learnt, 100% kept; usable from 5.6e-3 to 4.6e-2.",
        ),
        (
            {1e-3: (0, 1.0), 1e-2: (0.8, 0.9)},
            "Best: a at 1e-2: 80% learnt, 90% kept; usable at least from 5.6e-3 to 1e-2; try 1e-1.",
        ),
        (
            {1e-2: (0.8, 0.9), 1e-1: (0, 0)},
            "Best: a at 1e-2: 80% learnt, 90% kept; usable at least from 1e-2 to 1.5e-2; try 1e-3.",
        ),
        ({1e-2: (0.8, 0.9)}, "Best: a at 1e-2: 80% learnt, 90% kept; try 1e-3 and 1e-1."),
        (
            {1e-3: (0.1, 1.0), 1e-1: (0.8, 0.1)},
            "No rate is usable. Nearest: a at 1e-3: 10% learnt, 100% kept, learnt too little; try 1e-2.",
        ),
        (
            {1e-3: (0.1, 1.0), 1e-1: (0.8, 0.5)},
            "No rate is usable. Nearest: a at 1e-1: 80% learnt, 50% kept, kept too little; try 1e-2.",
        ),
        (
            {1e-3: (0.8, 0.5), 1e-2: (0.8, 0.1)},
            "No rate is usable. Nearest: a at 1e-3: 80% learnt, 50% kept, kept too little; try 1e-4.",
        ),
        ({1e-4: (0.0, 1.0), 1e-3: (0.01, 1.0)}, f"{GAIN}; try 1e-2."),
        ({1e-4: (0.0, 1.0), 1e-2: ("diverged",)}, f"{GAIN}; try 1e-3."),
        ({1e-1: ("diverged",), 1.0: ("diverged",)}, f"{GAIN}; try 1e-2."),
    ],
)
def test_the_best_its_range_and_what_to_try(tried, said):
    assert answer(compared({"a": tried})) == said


def test_without_what_was_kept_the_score_is_named():
    tried = {1e-3: (0.0,), 1e-2: (0.8,), 1e-1: (0.0,)}
    assert answer(compared({"a": tried}, (0.0,), kept=False)).startswith("Best: a at 1e-2: score 80%; usable from ")


def test_the_best_is_of_the_cells_that_kept_enough():
    """And not the one that learnt most and forgot most."""
    rows = {"a": {1e-3: (0.7, 0.95), 1e-2: (0.6, 0.9)}, "b": {1e-3: (0.8, 0.1), 1e-2: (0.8, 0.0)}}
    assert answer(compared(rows)).startswith("Best: a at 1e-3: 70% learnt, 95% kept; ")


def test_nothing_is_answered_of_pictures_that_were_not_judged():
    made = compared({"a": {1e-3: (0.0, 1.0), 1e-2: (0.8, 1.0)}})
    made.forget_scores()
    assert answer(made) == "" and not made.judged
    assert [made.verdict("a", rate) for rate in (1e-3, 1e-2)] == ["", ""]


def test_a_cell_that_diverged_counts_exactly_as_the_base():
    made = compared({"a": {1e-3: (0.5, 1.0), 1e-2: ("diverged",)}}, (0.25, 1.0))
    made.cells[1].metrics["score"] = -8.15
    assert [point.score for point in made.points("a")] == [0.5, 0.25]
