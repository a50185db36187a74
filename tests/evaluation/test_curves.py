"""Summaries of length curves, against the published RULER table and the prefix rule by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm.evaluation import curves
from lcm.evaluation.statistics import Interval

LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]
LLAMA = [95.5, 93.8, 91.6, 87.4, 84.7, 77.0]  # the 13-task means of RULER's own table
MISTRAL = [93.6, 91.2, 87.2, 75.4, 49.0, 13.8]
LWM = [82.3, 78.4, 73.7, 69.1, 68.1, 65.0]


def exact(values):
    return [Interval(v, v, v) for v in values]


@pytest.mark.parametrize(("scores", "length"), [(LLAMA, 32768), (MISTRAL, 16384), (LWM, 0)])
def test_effective_lengths_of_the_ruler_table(scores, length):
    result = curves.effective_length_of_scores(LENGTHS, exact(scores), 85.6)
    assert result == (length, length, length)


def test_weighted_averages_of_the_ruler_table():
    assert curves.average_increasing(LLAMA) == pytest.approx(85.38, abs=0.005)
    assert curves.average_decreasing(LLAMA) == pytest.approx(91.29, abs=0.005)


def test_prefix_rule_stops_at_the_first_failure():
    assert curves.effective_length_of_scores([1, 2, 4], exact([90, 80, 90]), 85.6).value == 1
    assert curves.effective_length_of_scores([4, 1, 2], exact([90, 90, 80]), 85.6).value == 1


def test_above_means_strictly_above():
    assert curves.effective_length_of_scores([1, 2], exact([90, 85.6]), 85.6).value == 1


intervals = st.tuples(*[st.floats(0, 1)] * 3).map(
    lambda t: Interval(*[sorted(t)[i] for i in (1, 0, 2)])
)


@given(st.lists(intervals, min_size=1, max_size=8), st.floats(0, 1))
def test_limits_enclose_the_point(points, threshold):
    lengths = [2**k for k in range(len(points))]
    for rule in (curves.effective_length_of_scores, curves.effective_length_of_losses):
        value, low, high = rule(lengths, points, threshold)
        assert low <= value <= high


def test_losses_are_judged_from_above():
    losses = [Interval(2.0, 1.9, 2.1), Interval(2.1, 2.0, 2.25), Interval(2.3, 2.1, 2.5)]
    threshold = curves.relative_threshold([256, 512, 1024], losses, 1.1)
    assert threshold == pytest.approx(2.2)
    result = curves.effective_length_of_losses([256, 512, 1024], losses, threshold)
    assert result == (512, 256, 1024)


def test_unknown_limits_give_an_unknown_length():
    alone = [Interval(2.0, 1.9, 2.1), Interval(2.0, math.nan, math.nan)]
    value, low, high = curves.effective_length_of_losses([256, 512], alone, 3.0)
    assert value == 512
    assert math.isnan(low) and math.isnan(high)


def test_area_over_log_length():
    assert curves.area_over_log_length([1, 2, 8], [1.0, 0.5, 0.5]) == pytest.approx(
        (0.75 * 1 + 0.5 * 2) / 3
    )
    assert curves.area_over_log_length(LENGTHS, [0.7] * 6) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="increasing"):
        curves.area_over_log_length([4, 2], [1, 1])


def test_chance_correction():
    assert curves.chance_corrected(0.25, 0.25) == 0
    assert curves.chance_corrected(1.0, 0.25) == 1
    assert curves.chance_corrected(0.625, 0.25) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="below 1"):
        curves.chance_corrected(1.0, 1.0)
