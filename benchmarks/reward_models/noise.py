"""Flipped training labels: plain Bradley-Terry against the unbiased noise-robust loss, judged on clean labels."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.feedback.intervals import interval, sigmoid
from benchmarks.reward_models.real_pairs import RealPairs, real_pairs, split
from cluster.reward_eval.linear import L2S
from cluster.reward_eval.numbers import Array, log_losses
from learner.reward_model.losses import target

FLIPPED = (0.0, 0.1, 0.2, 0.3)
MAX_STEPS = 60


def noise(arguments: argparse.Namespace) -> None:
    """Accuracy and log loss on test prompts, by share of flipped labels; the flip rate is known to the robust loss."""
    pairs = real_pairs(arguments)
    print("| flipped | plain: right, % | robust: right, % | robust less plain, points | plain: log loss ", end="")
    print("| robust: log loss | robust less plain |\n| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rate in FLIPPED:
        rows = np.array([compared(pairs, rate, seed) for seed in range(arguments.seeds)])
        plain, robust, plain_loss, robust_loss = rows.T
        cells = [interval(100 * plain, ".1f"), interval(100 * robust, ".1f"), interval(100 * (robust - plain), "+.1f")]
        cells += [interval(each, ".3f") for each in (plain_loss, robust_loss)]
        print(f"| {rate:.0%} | {' | '.join(cells)} | {interval(robust_loss - plain_loss, '+.3f')} |", flush=True)


def compared(pairs: RealPairs, rate: float, seed: int) -> list[float]:
    """Accuracy of plain and robust, then log loss of plain and robust."""
    train_N, choose_N, test_N = split(pairs.prompts_N, seed)
    rng = np.random.default_rng(seed)
    # Half of the pairs are turned round, so that a flipped label is not known by its side.
    turned_N = np.where(rng.random(len(train_N)) < 0.5, -1.0, 1.0)
    flipped_N = rng.random(len(train_N)) < rate
    x_NH, y_N = pairs.features_NH * turned_N[:, None], (turned_N > 0).astype(float)
    seen_N = np.where(flipped_N, 1 - y_N, y_N)
    found = []
    for assumed in (0.0, rate):
        target_N = target(torch.from_numpy(seen_N), flip_rate=assumed).numpy()
        weights = [fit_targets(x_NH[train_N], target_N[train_N], l2) for l2 in L2S]
        losses = [log_losses(x_NH[choose_N] @ each, target_N[choose_N]).mean() for each in weights]
        margins_N = pairs.features_NH[test_N] @ weights[int(np.argmin(losses))]
        found.append((float((margins_N > 0).mean()), float(log_losses(margins_N, np.ones(len(margins_N))).mean())))
    (plain, plain_loss), (robust, robust_loss) = found
    return [plain, robust, plain_loss, robust_loss]


def fit_targets(x_NH: Array, target_N: Array, l2: float, weight_N: Array | None = None) -> Array:
    """Least Σ weight · (log(1 + exp(margin)) - target · margin) + l2 / 2 · |w|²: convex in w whatever the targets are.

    Newton's method, a step halved until it is one downhill.
    """
    weight_N = np.ones(len(x_NH)) if weight_N is None else weight_N

    def objective(weights_H: Array) -> float:
        margin_N = x_NH @ weights_H
        fit = weight_N @ (np.logaddexp(0, margin_N) - target_N * margin_N)
        return float(fit + l2 / 2 * weights_H @ weights_H)

    weights_H = np.zeros(x_NH.shape[1])
    now = objective(weights_H)
    for _ in range(MAX_STEPS):
        p_N = sigmoid(x_NH @ weights_H)
        gradient_H = x_NH.T @ (weight_N * (p_N - target_N)) + l2 * weights_H
        hessian_HH = (x_NH * (weight_N * p_N * (1 - p_N))[:, None]).T @ x_NH + l2 * np.eye(len(weights_H))
        step_H = np.linalg.solve(hessian_HH, gradient_H)
        while (after := objective(weights_H - step_H)) > now and np.abs(step_H).max() > 1e-9:
            step_H = step_H / 2
        weights_H, now = weights_H - step_H, after
        if np.abs(step_H).max() < 1e-6:
            break
    return weights_H
