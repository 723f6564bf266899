"""The usable range against curves whose answer is known."""

import math

import pytest

from equipoise.pipelines.comparing.robustness import (
    GAIN,
    KEPT,
    USABLE,
    Point,
    kept_threshold,
    reach,
    shown_rate,
    threshold,
    usable,
    usable_range,
)


def test_the_line_lies_between_base_and_best():
    assert threshold(0.0, 1.0) == USABLE
    assert threshold(0.2, 0.6) == pytest.approx(0.2 + USABLE * 0.4)


def test_a_gain_that_may_be_noise_draws_no_line():
    assert threshold(0.0, 0.002) is None and threshold(0.5, 0.5 + 0.9 * GAIN) is None
    assert threshold(0.5, 0.4) is None and threshold(0.5, math.nan) is None
    assert threshold(0.0, GAIN) == USABLE * GAIN


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-4, "1e-4"), (1.5e-4, "1.5e-4"), (2e-4, "2e-4"), (1.0, "1e0"), (12.34567, "1.234567e1")]
)
def test_rates_are_written_so_that_they_can_be_told_apart(rate, text):
    assert shown_rate(rate) == text and float(text) == rate


def test_crossings_are_interpolated_on_the_logarithmic_axis():
    points = [Point(1e-5, 0.0), Point(1e-4, 1.0), Point(1e-3, 1.0), Point(1e-2, 0.0)]
    found = usable_range(points, 0.5)
    assert found is not None
    assert found.low == pytest.approx(10**-4.5)
    assert found.high == pytest.approx(10**-2.5)
    assert found.decades == pytest.approx(2.0)
    assert not found.open_low and not found.open_high
    assert str(found) == "3.16e-5 to 3.16e-3 (2.0 decades)"


def test_ends_of_what_was_tried_are_open():
    found = usable_range([Point(1e-4, 1.0), Point(1e-3, 0.9)], 0.5)
    assert found is not None
    assert found.open_low and found.open_high and found.decades == pytest.approx(1.0)
    assert "at least 1.0 decades" in str(found)


def test_a_gap_ends_the_range_that_holds_the_best_rate():
    points = [Point(1e-5, 0.6), Point(1e-4, 0.0), Point(1e-3, 1.0), Point(1e-2, 0.0)]
    found = usable_range(points, 0.5)
    assert found is not None and found.low > 1e-4 and not found.open_low


def test_nothing_works():
    assert usable_range([Point(1e-4, 0.1), Point(1e-3, 0.2)], 0.5) is None
    assert usable_range([], 0.5) is None


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_a_score_that_is_not_finite_is_a_failure(broken):
    found = usable_range([Point(1e-4, 1.0), Point(1e-3, broken)], 0.5)
    assert found is not None and found.high == 1e-4


def test_the_range_ends_where_what_was_kept_crosses_its_line():
    points = [Point(1e-4, 0.0, 1.0), Point(1e-3, 1.0, 1.0), Point(1e-2, 1.0, 0.0)]
    found = usable_range(points, 0.5, KEPT)
    assert found is not None and not found.open_high
    assert found.low == pytest.approx(10**-3.5), "the score's line"
    assert found.high == pytest.approx(10**-2.75)
    alone = usable_range(points, 0.5)
    assert alone is not None and alone.high == 1e-2 and alone.open_high


@pytest.mark.parametrize(
    ("outside", "end"),
    [
        (Point(1e-2, 0.0, 0.3), -2.9),  # score: (1 - 0.75) / 1; kept: (0.8 - 0.75) / 0.5
        (Point(1e-2, 0.0, 0.7), -2.75),  # the score is first
        (Point(1e-2, 0.0, 0.8), -2.75),  # what was kept is not crossed at all
        (Point(1e-2, 0.0), -2.75),  # nor known, as of a run that failed
    ],
)
def test_the_first_line_that_is_crossed_ends_the_range(outside, end):
    found = usable_range([Point(1e-3, 1.0, 0.8), outside], 0.75, 0.75)
    assert found is not None and found.high == pytest.approx(10**end)


def test_the_range_holds_the_best_of_those_that_kept_enough():
    points = [Point(1e-4, 0.8, 0.9), Point(1e-3, 1.0, 0.0), Point(1e-2, 0.9, 1.0), Point(1e-1, 0.9, 1.0)]
    assert [usable(point, 0.75, KEPT) for point in points] == [True, False, True, True]
    found = usable_range(points, 0.75, KEPT)
    assert found is not None and found.open_high and found.low == pytest.approx(10**-2.25)
    assert usable_range(points[1:2], 0.75, KEPT) is None, "it learnt most, and kept nothing"


def test_of_equal_scores_the_range_holds_that_which_kept_most():
    points = [Point(1e-4, 0.9, 0.8), Point(1e-3, 0.0, 1.0), Point(1e-2, 0.9, 1.0)]
    found = usable_range(points, 0.75, KEPT)
    assert found is not None and found.high == 1e-2 and found.low > 1e-3
    alone = usable_range(points, 0.75)
    assert alone is not None and alone.low == 1e-4, "the first, where only scores are judged"


def test_what_was_kept_and_is_not_measured_is_a_failure_where_it_counts():
    found = usable_range([Point(1e-4, 1.0, 1.0), Point(1e-3, 1.0)], 0.75, KEPT)
    assert found is not None and found.high == 1e-4 and not found.open_high
    assert usable(Point(1e-3, 1.0), 0.75) and not usable(Point(1e-3, 1.0), 0.75, KEPT)


def test_a_base_with_nothing_to_lose_draws_no_line():
    assert kept_threshold(1.0) == KEPT and kept_threshold(0.5) == KEPT / 2
    assert [kept_threshold(base) for base in (0.0, -1.0, math.nan, math.inf)] == [None] * 4


def test_what_comes_nearest_is_told_by_what_it_has_less_of():
    assert reach(Point(1e-3, 0.75, 1.0), 0.0, 0.75, 0.5) == 1
    assert reach(Point(1e-3, 0.6, 0.2), 0.2, 0.7, 0.5) == pytest.approx(0.4)
    assert reach(Point(1e-3, 0.3, 0.5), 0.2, 0.7, 0.5) == pytest.approx(0.2)
    assert reach(Point(1e-3, 0.3, 0.0), 0.2, 0.7) == pytest.approx(0.2)
    assert reach(Point(1e-3, 0.9), 0.2, 0.7, 0.5) == -math.inf


def test_order_does_not_matter():
    points = [Point(1e-2, 0.0), Point(1e-4, 0.2), Point(1e-3, 1.0)]
    assert usable_range(points, 0.5) == usable_range(points[::-1], 0.5)
