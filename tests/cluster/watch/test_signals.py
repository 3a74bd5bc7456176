"""Signals of a batch: small cases by hand, and distances against brute force."""

import numpy as np
import pytest

from cluster.watch.reference import mahalanobis, reference_of, shrunk_precision
from cluster.watch.signals import observe, repetition, sameness
from tests.cluster.watch.batches import batch, response


def test_repetition_is_the_share_of_ngrams_that_were_there_before():
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([7, 7, 7, 7, 7]) == pytest.approx(2 / 3)  # three times (7, 7, 7), one distinct
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)  # 123 231 312 123
    assert repetition([1, 2]) == 0.0


def test_sameness_counts_other_prompts_only():
    found = sameness([[1, 2, 3, 4], [1, 2, 3, 9], [5, 6, 7, 8], [5, 6, 7, 8]], ["a", "b", "c", "c"])
    assert found.tolist() == [0.5, 0.5, 0.0, 0.0]  # c's two responses share everything, but one prompt
    assert sameness([[1], []], ["a", "b"]).tolist() == [0.0, 0.0]


def test_a_batch_is_observed():
    samples = [
        response(
            [1, 2, 3],
            "a",
            {"proxy": 2.0, "proxy/std": 0.5, "proxy/latent": 1.0, "gold": 7.0, "gold/latent": 2.0},
            reward=2,
        ),
        response(
            [1, 2, 3, 4],
            "b",
            {"proxy": 4.0, "proxy/std": 1.5, "proxy/latent": 3.0, "gold": 5.0, "gold/latent": 1.0},
            reward=4,
        ),
    ]
    seen = observe(samples, weights={"proxy": 1.0, "gold": 0.0})
    assert seen.plain["disagreement"].tolist() == [0.5, 1.5]
    assert seen.plain["latent"].tolist() == [1.5, 2.0]
    assert seen.features_BF.shape == (2, 4), "two scores, length and reference: what stands behind a score is none"
    assert seen.plain["length"].tolist() == [3.0, 4.0]
    assert seen.reward_B.tolist() == [2.0, 4.0]
    assert seen.held_out_B is not None
    assert seen.held_out_B.tolist() == [7.0, 5.0]
    assert seen.num_groups == 2
    alone = observe([response([1], "a", {"proxy": 1.0}, reward=1.0)], weights={"proxy": 1.0})
    assert alone.held_out_B is None
    assert not {"disagreement", "latent"} & set(alone.plain)


def test_distances_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 3)) @ np.array([[2.0, 0, 0], [1.0, 0.5, 0], [0, 0, 3.0]])
    mean, precision = shrunk_precision(features)
    covariance = np.cov(features.T, bias=True)
    share = 3 / 53
    shrunk = (1 - share) * covariance + share * np.diag(np.diag(covariance))
    for row, distance in zip(features[:5], mahalanobis(features, mean, precision)[:5], strict=True):
        away = row - features.mean(axis=0)
        assert distance == pytest.approx(np.sqrt(away @ np.linalg.inv(shrunk) @ away))


def test_a_number_that_never_changes_counts_nothing():
    rng = np.random.default_rng(1)
    features = np.column_stack([rng.normal(size=40), np.full(40, 3.0)])
    mean, precision = shrunk_precision(features)
    moved = np.array([[0.0, 3.0], [0.0, 99.0]])
    one, other = mahalanobis(moved, mean, precision)
    assert one == other
    assert np.isfinite(one)


def test_a_jointly_unusual_response_is_far_though_each_number_is_usual():
    rng = np.random.default_rng(2)
    shared = rng.normal(size=400)
    features = np.column_stack([shared, shared + 0.1 * rng.normal(size=400)])
    mean, precision = shrunk_precision(features)
    along, across = mahalanobis(np.array([[1.5, 1.5], [1.5, -1.5]]), mean, precision)
    assert across > 5 * along


def test_the_held_out_gap_is_in_deviations_of_the_window():
    rng = np.random.default_rng(3)
    window = [observe(batch(rng, reward=0.0, held_out=0.0), weights={"proxy": 1.0, "gold": 0.0}) for _ in range(5)]
    reference = reference_of(window)
    assert reference.means["held_out"] == pytest.approx(0.0, abs=1e-9)
    both_rise = reference.signals(observe(batch(rng, reward=2.0, held_out=20.0), weights={"proxy": 1.0, "gold": 0.0}))
    alone = reference.signals(observe(batch(rng, reward=2.0, held_out=0.0), weights={"proxy": 1.0, "gold": 0.0}))
    assert reference.drift("held_out", both_rise["held_out"]) == pytest.approx(0.0, abs=0.6)
    assert reference.drift("held_out", alone["held_out"]) > 1.2
