"""Intervals against tables, R's worked example and the promise itself: 95 of 100 intervals hold the true mean."""

import json
import math

import numpy as np
import pytest

from cluster.intervals import Interval, mean_interval, paired_difference, t_quantile

# Two-sided quantiles, as printed in any table of Student's t and computed with scipy.stats.t.ppf.
TABLE = [
    (1, 0.95, 12.706204736174694),
    (2, 0.95, 4.302652729749462),
    (3, 0.95, 3.1824463052837078),
    (4, 0.90, 2.1318467863266495),
    (5, 0.95, 2.5705818356363146),
    (10, 0.99, 3.16927267261695),
    (30, 0.95, 2.0422724563012378),
    (63, 0.95, 1.998340542520741),
    (99, 0.99, 2.626405457280827),
    (1000, 0.95, 1.9623390808264083),
]


@pytest.mark.parametrize(("degrees", "confidence", "expected"), TABLE)
def test_quantiles_are_those_of_the_table(degrees, confidence, expected):
    assert t_quantile(degrees, confidence) == pytest.approx(expected, rel=1e-10)


def test_mean_interval_literal():
    interval = mean_interval([0.2, 0.5, 0.9, 0.4, 1.0])
    assert (interval.mean, interval.n) == (pytest.approx(0.6), 5)
    assert (interval.low, interval.high) == (pytest.approx(0.17893125180), pytest.approx(1.02106874820))
    narrow = mean_interval([0.2, 0.5, 0.9, 0.4, 1.0], confidence=0.9)
    assert (narrow.low, narrow.high) == (pytest.approx(0.27668942707), pytest.approx(0.92331057293))


def test_paired_difference_is_that_of_students_sleep_data():
    """Student (1908), table 1: extra hours of sleep; R's t.test(paired = TRUE) gives 0.7001142 to 2.4598858."""
    before = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    after = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    difference = paired_difference(before, after)
    assert difference.mean == pytest.approx(1.58)
    assert (difference.low, difference.high) == (pytest.approx(0.7001142, abs=1e-7), pytest.approx(2.4598858, abs=1e-7))
    assert (difference.n, difference.direction) == (10, 1)
    assert paired_difference(after, before).direction == -1


def test_pairing_removes_what_prompts_share():
    rng = np.random.default_rng(0)
    hardness = rng.normal(scale=10, size=40)
    before, after = hardness + rng.normal(scale=0.1, size=40), hardness + 1 + rng.normal(scale=0.1, size=40)
    assert paired_difference(before, after).low > 0.9
    assert mean_interval(after).high - mean_interval(after).low > 5


@pytest.mark.parametrize("n", [2, 5, 12])
def test_coverage(n):
    """A normal quantile instead of t would hold the mean only 70 % of the time at n = 2 and 88 % at n = 5."""
    rng = np.random.default_rng(n)
    hits = 0
    for sample in rng.normal(loc=3.0, scale=2.0, size=(4000, n)):
        interval = mean_interval(sample)
        hits += interval.low <= 3.0 <= interval.high
    assert hits / 4000 == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors of the simulation


def test_no_change_is_no_direction():
    assert paired_difference([0.3, 0.4], [0.3, 0.4]).direction == 0
    assert mean_interval([-1.0, 1.0, 0.5]).direction == 0


def test_one_value_bounds_nothing_and_still_fits_in_json():
    interval = mean_interval([0.4])
    assert interval == Interval(0.4, -math.inf, math.inf, 1)
    assert interval.direction == 0
    text = json.dumps(interval.record(), allow_nan=False)
    assert json.loads(text) == {"mean": 0.4, "low": None, "high": None, "n": 1}
    assert Interval.from_record(json.loads(text)) == interval


def test_refused():
    with pytest.raises(ValueError, match="values is empty"):
        mean_interval([])
    with pytest.raises(ValueError, match=r"values\[1\] is nan"):
        mean_interval([0.0, math.nan])
    with pytest.raises(ValueError, match=r"after\[0\] is inf"):
        paired_difference([0.0], [math.inf])
    with pytest.raises(ValueError, match="2 values and after 1"):
        paired_difference([0.0, 1.0], [0.0])
    with pytest.raises(ValueError, match="2 dimensions"):
        mean_interval(np.zeros((2, 2)))
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="confidence"):
            mean_interval([1.0], confidence=confidence)
