"""The alarm on features that leave what the reward model was trained on: real distances through the real watch."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.watch.acting import act
from cluster.watch.watching import Watch
from contracts.records import ScoredRollout
from contracts.watch import WatchConfig
from models.latent import TypicalFeatures
from tests.cluster.watch.batches import batch

HIDDEN = 96
SCALES = np.geomspace(0.1, 3, HIDDEN)
WEIGHTS = {"proxy": 1.0, "gold": 0.0}


def typical(rng: np.random.Generator) -> TypicalFeatures:
    return TypicalFeatures.fit(rng.normal(size=(128, HIDDEN)) * SCALES, np.arange(128) // 2)


def judged(rng: np.random.Generator, fitted: TypicalFeatures, shift_H: np.ndarray | float) -> list[ScoredRollout]:
    """A batch, and how far its features lie from the training data: a policy's, which is not the training's own."""
    samples = batch(rng)
    features = rng.normal(size=(len(samples), HIDDEN)) * 1.2 * SCALES + shift_H
    for sample, distance in zip(samples, fitted.distances(features), strict=True):
        sample.reward_components["proxy/latent"] = float(distance)
    return samples


def raised(watch: Watch, batches: list[list[ScoredRollout]]) -> dict[str, int]:
    return {
        alarm.name: alarm.step for step, samples in enumerate(batches, 1) for alarm in watch.step(step, samples).raised
    }


def test_a_policy_that_stays_raises_none_and_one_that_leaves_does() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        fitted = typical(rng)
        stays = [judged(rng, fitted, 0.0) for _ in range(20)]
        assert raised(Watch(WatchConfig(), WEIGHTS), stays) == {}
        towards = rng.normal(size=HIDDEN) * SCALES
        leaves = stays[:8] + [judged(rng, fitted, 0.2 * step * towards) for step in range(12)]
        found = raised(Watch(WatchConfig(), WEIGHTS), leaves)
        assert set(found) == {"latent"}, "its scores, length and words are as they were"
        assert 9 < found["latent"] <= 18


def test_where_the_policy_began_is_what_counts() -> None:
    """Responses far from the training data from the first step on are no drift."""
    rng = np.random.default_rng(50)
    fitted = typical(rng)
    assert raised(Watch(WatchConfig(), WEIGHTS), [judged(rng, fitted, SCALES) for _ in range(20)]) == {}


def test_it_can_be_switched_off() -> None:
    rng = np.random.default_rng(51)
    fitted = typical(rng)
    batches = [judged(rng, fitted, 0.0) for _ in range(5)] + [judged(rng, fitted, 3 * SCALES) for _ in range(4)]
    assert raised(Watch(WatchConfig(), WEIGHTS), batches) == {"latent": 7}
    assert raised(Watch(WatchConfig(latent=None), WEIGHTS), batches) == {}


async def test_a_reward_model_that_does_not_know_is_told_once() -> None:
    notes: list[str] = []
    progress = SimpleNamespace(note=notes.append, warn=notes.append)

    async def told(watch: Watch, batches: list[list[ScoredRollout]]) -> list[str]:
        notes.clear()
        job: Any = SimpleNamespace(watch=watch, progress=progress)
        for step, samples in enumerate(batches, 1):
            await act(job, watch.step(step, samples), samples)
        return list(notes)

    rng = np.random.default_rng(52)
    batches = [batch(rng) for _ in range(12)]
    line = "no alarm `latent`: proxy came without latent.safetensors; a reward model trained anew has it"
    assert await told(Watch(WatchConfig(), WEIGHTS, ["proxy"]), batches) == [line]
    assert await told(Watch(WatchConfig(latent=None), WEIGHTS, ["proxy"]), batches) == []
    assert await told(Watch(WatchConfig(), WEIGHTS), batches) == [], "functions were not trained on anything"
    fitted = typical(rng)
    known = [judged(rng, fitted, 0.0) for _ in range(12)]
    assert await told(Watch(WatchConfig(), WEIGHTS, ["proxy"]), known) == []
    later = [[replace(sample, reward_version="v2") for sample in samples] for samples in batches]
    assert await told(Watch(WatchConfig(), WEIGHTS, ["proxy"]), known[:6] + later[6:]) == [line]


def test_a_window_of_two_reward_models_has_what_both_know() -> None:
    rng = np.random.default_rng(53)
    fitted = typical(rng)
    watch = Watch(WatchConfig(reference_steps=2), WEIGHTS, ["proxy"])
    watch.step(1, judged(rng, fitted, 0.0))
    assert watch.step(2, batch(rng)).latent_unknown
    assert watch.step(3, judged(rng, fitted, 0.0)).row["watch/latent_drift"] == pytest.approx(0.0)
