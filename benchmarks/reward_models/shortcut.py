"""A cue that is right 90 % of the time in training and 10 % in the test: who takes the shortcut, and what helps."""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.feedback.intervals import interval
from benchmarks.reward_models.noise import fit_targets
from benchmarks.reward_models.real_pairs import RealPairs, real_pairs, split
from cluster.reward_eval.linear import L2S
from cluster.reward_eval.numbers import log_losses

CUE_STRENGTH = 3.0  # in standard deviations of a feature
AGREES = 0.9


def shortcut(arguments: argparse.Namespace) -> None:
    """Accuracy on test prompts where the cue is absent, agrees as in training, and is reversed."""
    pairs = real_pairs(arguments)
    print("| trained | no cue, % | cue as in training, % | cue reversed, % |\n| --- | ---: | ---: | ---: |")
    for name, balanced in (("on the labels as they are", None), ("without the cue", "absent"),
                           ("with pairs reweighted so that the cue says nothing", "weights")):  # fmt: skip
        rows = np.array([judged(pairs, balanced, seed) for seed in range(arguments.seeds)])
        print(f"| {name} | {' | '.join(interval(100 * each, '.1f') for each in rows.T)} |", flush=True)


def judged(pairs: RealPairs, balanced: str | None, seed: int) -> list[float]:
    """Accuracy on test pairs without the cue, with it as in training, and reversed.

    The cue is one more feature, as a phrase would be that a trunk knows: on the better side with probability
    AGREES, else on the worse one. Reweighting gives pairs with a cue against their label, of which there are few,
    the same weight in sum as those with one for it.
    """
    train_N, choose_N, test_N = split(pairs.prompts_N, seed)
    agrees_N = np.random.default_rng(seed).random(len(train_N)) < AGREES
    cue_N = CUE_STRENGTH * np.where(agrees_N, 1.0, -1.0)
    with_cue_NH = np.hstack([pairs.features_NH, (0 * cue_N if balanced == "absent" else cue_N)[:, None]])
    weight_N = np.where(agrees_N, 0.5 / AGREES, 0.5 / (1 - AGREES)) if balanced == "weights" else np.ones(len(cue_N))
    ones_N = np.ones(len(cue_N))
    heads = [fit_targets(with_cue_NH[train_N], ones_N[train_N], l2, weight_N[train_N]) for l2 in L2S]
    losses = [
        (weight_N[choose_N] * log_losses(with_cue_NH[choose_N] @ head, ones_N[choose_N])).mean() for head in heads
    ]
    head = heads[int(np.argmin(losses))]
    plain_N = pairs.features_NH[test_N] @ head[:-1]
    shift_N = head[-1] * cue_N[test_N]
    return [float((plain_N + sign * shift_N > 0).mean()) for sign in (0.0, 1.0, -1.0)]
