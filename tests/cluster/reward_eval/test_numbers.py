"""The numbers against literal small cases, brute force and simulated truth."""

import math

import numpy as np
import pytest

from cluster.reward_eval.numbers import (
    accuracy,
    better_by,
    by_domain,
    by_length,
    calibration,
    mean_over_prompts,
    quality,
    share,
    sigmoid,
)


def each_alone(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


def test_accuracy_counts_decided_pairs_and_equal_scores_as_half():
    margins = np.array([2.0, -1.0, 0.0, 3.0, -5.0])
    labels = np.array([1.0, 0.3, 1.0, 0.5, 0.9])  # the fourth is a split vote
    found = accuracy(margins, labels, each_alone(5))
    assert found.value == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert (found.pairs, found.prompts) == (4, 4)


def test_losses_are_those_of_the_formula():
    found = quality(np.array([0.0, math.log(3)]), np.array([1.0, 0.0]), each_alone(2))
    assert found.log_loss.mean == pytest.approx((math.log(2) + math.log(4)) / 2)  # P = 1/2 and 3/4
    assert found.brier.mean == pytest.approx((0.25 + 0.75**2) / 2)
    huge = quality(np.array([2000.0, -2000.0]), np.array([1.0, 1.0]), each_alone(2))
    assert huge.log_loss.mean == pytest.approx(1000)  # no overflow


def test_an_interval_of_independent_pairs_is_wilsons():
    values = np.array([1.0] * 80 + [0.0] * 20)
    found = share(values, each_alone(100))
    # Wilson 1927 by hand with t(99) = 1.984 in the place of 1.96 and n = 100 (cluster variance is n/(n-1) larger: 99)
    z2, n = 1.98422**2, 99
    center, half = (0.8 + z2 / (2 * n)) / (1 + z2 / n), math.sqrt(z2 * (0.16 / n + z2 / (4 * n * n))) / (1 + z2 / n)
    assert (found.low, found.high) == pytest.approx((center - half, center + half), abs=1e-5)


def test_copies_of_a_pair_add_nothing():
    rng = np.random.default_rng(0)
    values = (rng.random(60) < 0.7).astype(float)
    once = share(values, each_alone(60))
    copied = share(np.repeat(values, 10), [prompt for prompt in each_alone(60) for _ in range(10)])
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert copied.pairs == 600


def test_all_right_is_no_certainty():
    found = share(np.ones(200), [f"prompt {number % 20}" for number in range(200)])
    assert found.value == found.high == 1.0
    assert 0.8 < found.low < 0.9  # 20 prompts, not 200 pairs


@pytest.mark.parametrize("within", [0.0, 0.3])
def test_intervals_hold_what_they_promise(within: float):
    """Pairs on one prompt agree more or less: in 95 of 100 draws the true share lies inside."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        level = np.clip(0.75 + within * rng.uniform(-0.8, 0.8, 40), 0, 1)
        values = (rng.random((40, 6)) < level[:, None]).astype(float).ravel()
        found = share(values, [f"{number // 6}" for number in range(240)])
        inside += found.low <= 0.75 <= found.high
    assert 0.92 <= inside / 400 <= 0.985


def test_losses_over_prompts_need_two_prompts():
    assert mean_over_prompts(np.array([1.0, 2.0]), ["a", "a"]).low == -math.inf
    two = mean_over_prompts(np.array([1.0, 2.0]), ["a", "b"])
    # t(1) = 12.706, standard error sqrt(2 * (0.25 + 0.25)) / 2
    assert two.high - two.mean == pytest.approx(12.706 * 0.5, abs=1e-3)


def test_a_paired_gain_is_narrower_than_its_parts():
    rng = np.random.default_rng(2)
    hard = rng.normal(size=300)
    one, other = hard + 0.3 * rng.normal(size=300) + 0.5, hard + 0.3 * rng.normal(size=300)
    labels = np.ones(300)
    gain = better_by(one, other, labels, each_alone(300))
    assert gain.mean == pytest.approx(np.mean(one > 0) - np.mean(other > 0))
    alone = accuracy(one, labels, each_alone(300))
    assert gain.high - gain.low < 1.42 * (alone.high - alone.low)


def test_exact_probabilities_are_within_chance_and_doubled_ones_are_not():
    rng = np.random.default_rng(3)
    margins = rng.normal(0, 1.5, 3000)
    labels = (rng.random(3000) < sigmoid(margins)).astype(float)
    for equal_mass in (False, True):
        exact = calibration(margins, labels, each_alone(3000), equal_mass=equal_mass)
        sure = calibration(3 * margins, labels, each_alone(3000), equal_mass=equal_mass)
        assert exact.error <= exact.chance_limit < sure.error
        assert exact.by_chance < exact.chance_limit
        assert sum(each.agreement.pairs for each in exact.bins) == 3000


def test_the_calibration_error_is_the_brute_force_sum():
    margins = np.array([0.2, -0.3, 1.0, 1.2, -4.0])
    labels = np.array([1.0, 1.0, 1.0, 0.0, 0.2])
    confidence = [1 / (1 + math.exp(-abs(m))) for m in margins]  # 0.550, 0.574, 0.731, 0.769, 0.982
    agreement = [1.0, 0.0, 1.0, 0.0, 0.8]
    total = 0.0
    for low in np.linspace(0.5, 0.95, 10):
        inside = [i for i, c in enumerate(confidence) if low <= c < low + 0.05]
        total += abs(sum(confidence[i] - agreement[i] for i in inside))
    found = calibration(margins, labels, each_alone(5), equal_mass=False)
    assert found.error == pytest.approx(total / 5)
    mass = calibration(margins, labels, each_alone(5), equal_mass=True, num_bins=5)
    assert mass.error == pytest.approx(sum(abs(c - a) for c, a in zip(confidence, agreement, strict=True)) / 5)


def test_domains_are_judged_by_themselves():
    margins, labels = np.array([1.0, 1.0, -1.0]), np.ones(3)
    found = by_domain(margins, labels, each_alone(3), ["code", "chat", "chat"])
    assert list(found) == ["chat", "code"]
    assert (found["chat"].accuracy.value, found["code"].accuracy.value) == (0.5, 1.0)


def test_a_model_of_length_alone_is_found_out():
    rng = np.random.default_rng(4)
    lengths = rng.integers(20, 200, (2000, 2))
    longer_is_better = np.sign(lengths[:, 0] - lengths[:, 1]).astype(np.float64)
    labels = (rng.random(2000) < 0.6).astype(float)  # about something else
    found = by_length(longer_is_better, labels, each_alone(2000), lengths)
    assert found["longer"].value == 1.0
    assert found["shorter"].value == 0.0
    assert 0.4 < found["matched"].value < 0.6
    assert found["matched"].pairs == sum(abs(a - b) <= 0.1 * max(a, b) for a, b in lengths)
