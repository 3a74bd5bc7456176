"""The sizing decision: by hand where it is clear, and the properties that it promises."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscale import Limits, Load, Steady, most_workers, reason, target_workers

LIMITS = Limits(min_workers=1, max_workers=100)


def load(workers=10, *, free=0.0, wait=0.0, blocked=0.0, samples_wanted=10**6, places=64):
    return Load(workers, free, wait, blocked, samples_wanted, places)


@pytest.mark.parametrize(
    ("measured", "target"),
    [
        (load(), 10),  # everybody works
        (load(wait=0.4), 17),  # engines full, the learner works 60 % of the time: 10 / 0.6
        (load(wait=0.9), 20),  # at most twice as many at once
        (load(wait=1.0), 20),
        (load(free=0.6), 4),  # the learner never waits, four engines would do
        (load(blocked=0.5), 5),
        (load(free=0.1, wait=0.05), 10),  # within the hysteresis
        (load(free=0.5, wait=0.5), 10),  # they take turns (max_lag_steps 0): as many as before
        (load(free=0.3, wait=0.6), 10),  # both wait for stragglers: more engines would wait too
        (load(wait=0.5, samples_wanted=900), 15),  # 15 engines hold all that may be open
        (load(workers=20, samples_wanted=640), 10),
        (load(workers=0), 1),
        (load(workers=90, wait=0.5), 100),
        (load(free=1.0), 1),
    ],
)
def test_by_hand(measured, target):
    assert target_workers(measured, LIMITS) == target


fractions = st.floats(0, 1)
loads = st.builds(
    Load, st.integers(0, 200), fractions, fractions, fractions, st.integers(1, 10**5), st.integers(1, 1024)
)


@settings(max_examples=500, deadline=None)
@given(loads, fractions, st.integers(1, 50), st.integers(0, 100), st.sampled_from([0.0, 0.15, 0.5]))
def test_it_stays_within_the_limits_and_is_monotone(measured, other, min_workers, more, hysteresis):
    limits = Limits(min_workers, min_workers + more, hysteresis)
    target = target_workers(measured, limits)
    assert min_workers <= target <= min_workers + more

    def at(name, value):
        return target_workers(replace(measured, **{name: value}), limits)

    low, high = sorted([other, measured.free_places_fraction])
    assert at("free_places_fraction", low) >= at("free_places_fraction", high)
    low, high = sorted([other, measured.queue_blocked_fraction])
    assert at("queue_blocked_fraction", low) >= at("queue_blocked_fraction", high)
    low, high = sorted([other, measured.learner_wait_fraction])
    assert at("learner_wait_fraction", low) <= at("learner_wait_fraction", high)
    assert at("samples_wanted", measured.samples_wanted) <= at("samples_wanted", measured.samples_wanted + 64)


def test_limits_are_checked():
    with pytest.raises(ValueError, match="min_workers 3"):
        Limits(min_workers=3, max_workers=2)


def measured_with(workers, needed, *, noise=0.0, draw=None):
    """What is seen where `needed` full workers would keep the learner busy, off by up to `noise`."""
    off = 1 + (draw.uniform(-noise, noise) if draw else 0.0)
    return load(workers, free=max(0.0, 1 - needed * off / workers), wait=max(0.0, 1 - workers / (needed * off)))


@pytest.mark.parametrize(
    ("changed", "target"),
    [
        ({"ready": 5.0}, 9),  # five are still starting: with 8.3 there will be enough
        ({"ready": 8.0}, 14),
        ({"ready": 0.0}, 10),  # nothing was measured
        ({"cold_start_s": 60.0, "remaining_s": 59.0}, 10),  # they would come when the run is over
        ({"cold_start_s": 60.0, "remaining_s": 61.0}, 17),
        ({"worker_s_left": 1300.0, "interval_s": 100.0}, 13),  # 13 can be paid for until the next decision
        ({"worker_s_left": 0.0, "interval_s": 100.0}, 1),
        ({"worker_s_left": -5.0}, 1),
    ],
)
def test_what_is_starting_and_what_it_costs_count(changed, target):
    assert target_workers(replace(load(wait=0.4), **changed), LIMITS) == target


@settings(max_examples=300, deadline=None)
@given(loads, st.integers(1, 50), st.integers(0, 100), st.floats(0, 1e5), st.floats(0, 1e4), st.floats(0, 200))
def test_neither_the_bound_nor_the_limits_nor_the_money_are_ever_exceeded(
    measured, min_workers, more, left_s, remaining_s, ready
):
    limits = Limits(min_workers, min_workers + more)
    measured = replace(
        measured, worker_s_left=left_s, interval_s=60.0, remaining_s=remaining_s, cold_start_s=100.0, ready=ready
    )
    steady = Steady(begun_s=0.0)
    for at_s in (10.0, 1000.0):
        target = steady.decide(measured, limits, at_s=at_s, keep_s=100.0)
        assert min_workers <= target <= limits.max_workers
        if target > min_workers:  # so many always run
            assert (target - 1) * measured.places_per_worker < measured.samples_wanted
            assert target * 60.0 <= left_s
            assert target <= measured.workers or remaining_s >= 100.0
    for name in ("worker_s_left", "remaining_s"):
        richer = replace(measured, **{name: 2 * getattr(measured, name) + 60})
        assert target_workers(richer, limits) >= target_workers(measured, limits)


@settings(max_examples=300, deadline=None)
@given(st.floats(0.5, 90.0), st.integers(1, 100), st.integers(0, 10**6))
def test_it_comes_to_a_number_that_feeds_the_learner_and_stays_there_under_noise(needed, workers, seed):
    draw, steady, numbers = random.Random(seed), Steady(begun_s=0.0), []
    for decision in range(40):
        seen = measured_with(workers, needed, noise=0.05, draw=draw)
        workers = steady.decide(seen, LIMITS, at_s=60.0 * decision, keep_s=180.0)
        numbers.append(workers)
    # Noise at the edge of the hysteresis may push it over, once; it does not come back.
    assert sum(a != b for a, b in pairwise(numbers[12:])) <= 1
    assert 0.8 * needed <= workers <= max(1.0, needed) * 1.25 + 1


def test_without_hysteresis_the_same_noise_would_move_it_to_and_fro():
    """That the property above can fail."""
    draw, numbers, workers, limits = random.Random(0), [], 10, Limits(1, 100, hysteresis=0.0)
    for _ in range(40):
        workers = target_workers(measured_with(workers, 10.0, noise=0.05, draw=draw), limits)
        numbers.append(workers)
    assert sum(a != b for a, b in pairwise(numbers[12:])) > 5


def test_workers_go_when_they_were_too_many_for_as_long_as_a_start_takes():
    steady, limits, few = Steady(begun_s=0.0), Limits(1, 8), measured_with(8, 2.0)
    assert [steady.decide(few, limits, at_s=at_s, keep_s=100.0) for at_s in (50, 99)] == [8, 8]
    assert steady.decide(measured_with(8, 5.0), limits, at_s=101, keep_s=100.0) == 5
    assert steady.decide(measured_with(5, 2.0), limits, at_s=150, keep_s=100.0) == 5
    assert steady.decide(measured_with(5, 2.0), limits, at_s=202, keep_s=100.0) == 2
    assert steady.decide(measured_with(2, 8.0), limits, at_s=203, keep_s=100.0) == 4  # growing needs no patience
    assert steady.decide(replace(measured_with(4, 2.0), samples_wanted=64), limits, at_s=204, keep_s=100.0) == 1


def test_nobody_goes_while_some_are_starting():
    steady, limits, few = Steady(begun_s=-1000.0), Limits(1, 8), replace(measured_with(4, 2.0), ready=2.0, starting=2)
    assert [steady.decide(few, limits, at_s=at_s, keep_s=1.0) for at_s in (10, 20)] == [4, 4]
    assert steady.decide(replace(few, samples_wanted=64), limits, at_s=30, keep_s=1.0) == 1
    assert steady.decide(replace(few, starting=0), limits, at_s=40, keep_s=1.0) < 4


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        (load(wait=0.4), "the learner waits for 40% of the time, the engines are full"),
        (load(free=0.6), "60% of the engines' places are not needed, the learner waits 0%"),
        (load(samples_wanted=128), "no more than 128 responses may be open: 2 workers hold them"),
        (replace(load(), worker_s_left=1800.0, interval_s=600.0), "0.50 of max_worker_hours are left"),
        (load(workers=200), "max_workers is 100"),
        (load(workers=0), "min_workers is 1"),
    ],
)
def test_the_reason_in_words(measured, words):
    target = target_workers(measured, LIMITS)
    assert target != measured.workers
    assert target <= most_workers(measured, LIMITS)
    assert reason(measured, LIMITS, target) == words
