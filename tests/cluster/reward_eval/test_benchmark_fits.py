"""What benchmarks/reward_models fits: the trainer's own noise-robust loss, solved exactly."""

import numpy as np
import pytest
import torch

from benchmarks.feedback.intervals import sigmoid
from benchmarks.reward_models.noise import fit_targets
from benchmarks.reward_models.real_pairs import split
from learner.reward_model import bradley_terry_loss
from learner.reward_model.losses import target


def test_the_objective_is_the_trainers_robust_loss():
    """At its least value, a small step of the weights any way costs the trainer's loss plus the ridge nothing."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 3)), rng.integers(0, 2, 60).astype(float)

    def cost(weights, rate):
        margins = torch.tensor(x @ weights)
        fit = bradley_terry_loss(margins, torch.tensor(labels), num_pairs=1, flip_rate=rate)
        return fit.item() + 5.0 / 2 * weights @ weights

    for rate in (0.0, 0.3):
        fitted = fit_targets(x, target(torch.tensor(labels), flip_rate=rate).numpy(), 5.0)
        least = cost(fitted, rate)
        assert all(cost(fitted + 0.01 * step, rate) > least for step in (*np.eye(3), *-np.eye(3)))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_fit_solves_its_equations(rate):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 5))
    labels = torch.from_numpy((rng.random(300) < sigmoid(x[:, 0])).astype(float))
    targets = target(labels, flip_rate=rate).numpy()
    weight = rng.uniform(0.1, 3.0, 300)
    fitted = fit_targets(x, targets, 2.0, weight)
    gradient = x.T @ (weight * (sigmoid(x @ fitted) - targets)) + 2.0 * fitted
    assert np.abs(gradient).max() < 1e-4


def test_the_three_parts_of_a_split_share_no_prompt():
    prompts = [f"prompt {number // 3}" for number in range(300)]
    parts = split(prompts, 7)
    assert (np.stack(parts).sum(axis=0) == 1).all()
    names = [{prompt for prompt, inside in zip(prompts, part, strict=True) if inside} for part in parts]
    assert [len(each) for each in names] == [60, 20, 20]
    assert len(set.union(*names)) == 100
