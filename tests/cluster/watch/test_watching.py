"""Alarms: raised by what they watch, by nothing else, not by noise, with hysteresis, and the same after a resume."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.metrics import reward_metrics
from cluster.watch.triggers import Trigger
from cluster.watch.watching import Seen, Watch
from contracts.watch import AlarmConfig, WatchConfig
from tests.cluster.watch.batches import batch

WEIGHTS = {"proxy": 1.0, "gold": 0.0}


def seen_in(watch: Watch, steps: int, *, seed: int = 0, first: int = 1, **changes) -> list[Seen]:
    """`changes` grow by that much a step."""
    rng = np.random.default_rng(seed)
    usual = {"length": 40.0, "std": 0.2, "latent": 1.0}
    return [
        watch.step(first + at, batch(rng, **{name: usual.get(name, 0.0) + by * at for name, by in changes.items()}))
        for at in range(steps)
    ]


def test_a_trigger_waits_and_lets_go_late():
    trigger = Trigger(AlarmConfig(drift=1.0, raise_after=2, clear_below=0.5))
    drifts = [0.9, 1.2, 0.8, 1.1, 1.3, 1.5, 0.7, 0.6, 0.4, 1.2, 1.2]
    found = [trigger.update(step, drift, noise=0.1) for step, drift in enumerate(drifts, 1)]
    assert found == [None, None, None, None, "raised", None, None, None, "cleared", None, "raised"]
    assert trigger.onset == 10


def test_the_onset_is_the_first_step_of_those_in_a_row():
    trigger = Trigger(AlarmConfig(drift=1.0, raise_after=3))
    for step, drift in enumerate([2.0, 0.0, 2.0, 2.0, 2.0], 1):
        trigger.update(step, drift, noise=0.0)
    assert (trigger.raised, trigger.onset) == (True, 3)


def test_what_noise_explains_is_no_alarm():
    trigger = Trigger(AlarmConfig(drift=0.2, raise_after=1))
    assert trigger.update(1, 0.5, noise=0.6) is None
    assert trigger.update(2, 0.7, noise=0.6) == "raised"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"length": 2.0}, "length"),
        ({"length": -2.0}, "length"),
        ({"repeated": 0.08}, "repetition"),
        ({"repeated": 0.08}, "sameness"),
        ({"std": 0.02}, "disagreement"),
        ({"latent": 0.1}, "latent"),
        ({"reward": 0.4}, "held_out"),
        ({"reward": 0.4}, "outliers"),
    ],
)
def test_each_alarm_sees_what_it_is_for(change, name):
    watch = Watch(WatchConfig(), WEIGHTS)
    still: dict[str, Any] = dict.fromkeys(change, 0.0)
    seen_in(watch, 5, **still)
    alarms = [alarm for seen in seen_in(watch, 12, first=6, seed=1, **change) for alarm in seen.raised]
    raised = {alarm.name: alarm for alarm in alarms}
    assert name in raised
    assert 6 <= raised[name].onset < raised[name].step <= 17
    if "length" in change:
        assert set(raised) <= {"length", "outliers"}
    if "std" in change or "latent" in change:
        assert set(raised) == {name}


def test_a_policy_that_stays_raises_nothing():
    for seed in range(6):
        watch = Watch(WatchConfig(), WEIGHTS)
        assert [alarm.name for seen in seen_in(watch, 60, seed=seed) for alarm in seen.raised] == []


def test_a_reward_that_rises_with_the_held_out_one_raises_no_gap():
    watch = Watch(WatchConfig(outliers=None), WEIGHTS)
    seen_in(watch, 5)
    assert [s.raised for s in seen_in(watch, 10, first=6, seed=1, reward=0.3, held_out=3.0) if s.raised] == []


def test_another_reward_model_begins_a_new_window():
    watch = Watch(WatchConfig(), WEIGHTS)
    seen_in(watch, 8)
    rng = np.random.default_rng(2)
    for step in range(9, 20):  # its scale is another one, and the policy is as it was
        samples = [replace(sample, reward_version="v2") for sample in batch(rng, reward=50.0)]
        assert watch.step(step, samples).raised == ()


def test_rows_have_all_keys_and_are_finite():
    watch = Watch(WatchConfig(reference_steps=2, repetition=None), WEIGHTS)
    rows = [seen.row for seen in seen_in(watch, 4, length=30.0)]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "watch/length_drift" in rows[0]
    assert "watch/repetition" not in rows[0]
    assert (rows[1]["watch/length_drift"], rows[3]["watch/length_drift"]) == (0.0, pytest.approx(5.4, abs=2.5))


def test_the_most_suspicious_responses_come_first():
    watch = Watch(WatchConfig(suspicious=3), WEIGHTS)
    seen_in(watch, 5)
    rng = np.random.default_rng(5)
    watch.step(6, batch(rng, length=120.0))
    samples = batch(rng, length=120.0)
    (alarm,) = [each for each in watch.step(7, samples).raised if each.name == "length"]
    lengths = [len(sample.rollout.response_tokens) for sample in samples]
    assert [lengths[at] for at in alarm.suspicious] == sorted(lengths, reverse=True)[:3]


def test_looking_back_gives_the_same_watch():
    rng = np.random.default_rng(6)
    steps = [batch(rng, length=40.0 + 3 * at) for at in range(12)]
    whole, again = Watch(WatchConfig(), WEIGHTS), Watch(WatchConfig(), WEIGHTS)
    rows = [whole.step(step, samples).row for step, samples in enumerate(steps, 1)]
    for step, samples in enumerate(steps[:9], 1):
        again.step(step, samples)
    assert [again.step(step, samples).row for step, samples in enumerate(steps[9:], 10)] == rows[9:]


def test_an_ensemble_that_comes_while_the_run_goes_on_is_no_alarm():
    rng = np.random.default_rng(7)
    watch = Watch(WatchConfig(reference_steps=2), WEIGHTS)
    for step in range(1, 8):
        samples = batch(rng)
        for at, sample in enumerate(samples):
            if step < 4 or (step == 4 and at % 2):
                del sample.reward_components["proxy/std"]
        seen = watch.step(step, samples)
        assert (seen.raised, seen.row["watch/disagreement_drift"]) == ((), 0.0)
    assert seen.row["watch/disagreement"] == pytest.approx(0.2, abs=0.05)
    assert reward_metrics(samples)["reward/proxy/std"] == pytest.approx(0.2, abs=0.05)
    del samples[0].reward_components["proxy/std"]
    rest = [sample.reward_components["proxy/std"] for sample in samples[1:]]
    assert reward_metrics(samples)["reward/proxy/std"] == pytest.approx(sum(rest) / len(rest))
