"""The sizing decision: by hand where it is clear, and the properties that it promises."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscale import Limits, Load, target_workers

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
