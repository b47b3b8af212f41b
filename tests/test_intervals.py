"""Intervals hold the true value as often as they say, with few prompts too."""

import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from interval_coverage import FIGURES, coverage

from peagle_hf.evaluation.intervals import (
    all_and_leave_one_out,
    degrees_of_freedom,
    difference_interval,
    is_difference,
    ratio_interval,
    share_interval,
    student_t,
)

TRIALS = 400
"""The share of so many trials has a standard error of 1.1 points."""


def test_student_t_is_that_of_the_tables():
    table = {1: 12.7062, 2: 4.3027, 5: 2.5706, 10: 2.2281, 79: 1.9905, 5_000: 1.9604}
    assert {degrees: student_t(degrees) for degrees in table} == pytest.approx(table, rel=1e-4)
    assert student_t(2) < student_t(1.5) < student_t(1)


def test_a_mean_has_the_interval_of_students_t():
    """With prompts of one size the jackknife's error is the standard error of the mean."""
    values = np.array([0.1, 0.2, 0.4, 0.0, 0.3, 0.2, 0.9])
    weights = all_and_leave_one_out(7)
    means = weights @ values / weights.sum(1)
    degrees = degrees_of_freedom([np.full(7, 30)])
    assert degrees == pytest.approx(6)
    half = student_t(6) * values.std(ddof=1) / 7**0.5
    assert difference_interval(means, degrees) == pytest.approx([values.mean() - half, values.mean() + half])
    low, high = ratio_interval(means, degrees)
    assert low * high == pytest.approx(values.mean() ** 2)
    assert all_and_leave_one_out(5).tolist() == [[1] * 5]
    verdicts = [is_difference(found, 0) for found in ([0.1, 0.2], [-0.1, 0.2], [-0.2, -0.1], [0.0, 0.0], None)]
    assert verdicts == [True, False, True, False, None]


def test_one_long_answer_among_short_ones_leaves_few_degrees_of_freedom():
    assert degrees_of_freedom([[100, 1, 1, 1, 1, 1]]) == 1
    assert degrees_of_freedom([[3, 3, 3, 3], [9, 9, 9, 1]]) == pytest.approx(28**2 / 244 - 1)


def test_a_share_of_none_or_all_has_an_interval_within_its_limits():
    """Nothing was accepted of 100 drafts: up to 3.7 % may be, as by the rule for independent drafts (Wilson)."""
    weights = all_and_leave_one_out(10)
    for accepted, expected in ((0, [0, 0.037]), (10, [0.963, 1])):
        shares = weights @ np.full(10, accepted) / (weights @ np.full(10, 10))
        assert share_interval(shares, 9, 100) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("prompts", [6, 10])
def test_nineteen_of_twenty_intervals_hold_the_true_value(prompts, monkeypatch):
    """Those of the report do; the percentile bootstrap, which they replaced, doesn't."""
    monkeypatch.setattr("interval_coverage.POPULATION", 100)
    found = coverage("weak", prompts, TRIALS, seed=3, methods=("jackknife", "percentile"))
    common = [figure for figure in FIGURES if figure not in ("position 3", "position 4")]
    assert all(92.5 <= found["jackknife"][figure] <= 98 for figure in common), found["jackknife"]
    assert all(found["jackknife"][figure] >= 92.5 for figure in FIGURES), found["jackknife"]
    means = {method: fmean(shares[figure] for figure in common) for method, shares in found.items()}
    assert 94 <= means["jackknife"] <= 96.5
    assert means["percentile"] < 91.5
    assert found["percentile"]["position 4"] < 40
