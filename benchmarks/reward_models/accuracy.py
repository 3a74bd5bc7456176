"""What heads on frozen features reach on prompts that they have not seen, beside what is simpler."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.feedback.intervals import interval
from benchmarks.reward_models.real_pairs import RealPairs, only, real_pairs, split
from cluster.reward_eval import linear
from cluster.reward_eval.numbers import Array, calibration, log_losses, quality
from contracts.records import Comparison


def accuracy_of_heads(arguments: argparse.Namespace) -> None:
    """Accuracy, calibration and losses on test prompts, for the head and its baselines."""
    pairs = real_pairs(arguments)
    lengths = word_counts(pairs.rows)
    chosen, rejected = [row.chosen for row in pairs.rows], [row.rejected for row in pairs.rows]
    inputs = {
        "length alone": (linear.length_differences(lengths), (1e-3,)),
        "bag of words": (linear.word_differences(chosen, rejected), linear.L2S),
        "head on frozen features": (pairs.features_NH, linear.L2S),
        "head, and length": (np.hstack([pairs.features_NH, linear.length_differences(lengths)]), linear.L2S),
    }
    strata = {
        "like": np.abs(lengths[:, 0] - lengths[:, 1]) <= 0.1 * np.maximum(lengths.max(axis=1), 1),
        "longer": lengths[:, 0] > lengths[:, 1],
        "shorter": lengths[:, 0] < lengths[:, 1],
    }
    found = {name: [scored(pairs, *each, list(strata.values()), seed) for seed in range(arguments.seeds)]
             for name, each in inputs.items()}  # fmt: skip
    counts = {name: int(in_N.sum()) for name, in_N in strata.items()}
    print(f"{counts['like']} pairs are of like length (within 10 %); the better answer has more words in ", end="")
    print(f"{counts['longer']} pairs and fewer in {counts['shorter']}.\n")
    print("| | right, % | of like length, % | better is longer, % | shorter, % | log loss ", end="")
    print("| calibration error | adaptive | by chance |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, rows in found.items():
        columns = np.array(rows).T
        cells = [interval(100 * each, ".1f") for each in columns[:4]] + [interval(each, ".3f") for each in columns[4:]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    for name in ("length alone", "bag of words"):
        gain = 100 * (np.array(found["head on frozen features"])[:, 0] - np.array(found[name])[:, 0])
        print(f"\nThe head is right on {interval(gain, '+.1f')} points more than {name}.")
    one = quality(*one_test(pairs, seed=0))
    print(
        f"\nOver the prompts of one test set (seed 0, {one.accuracy.prompts} prompts) the head's interval is ", end=""
    )
    print(f"{100 * one.accuracy.low:.1f} to {100 * one.accuracy.high:.1f} %.")


def scored(
    pairs: RealPairs, differences_ND: Array, l2s: Sequence[float], strata: Sequence[NDArray[np.bool_]], seed: int
) -> list[float]:
    """Accuracy, accuracy in the strata, log loss, both calibration errors, what chance gives the first."""
    margins_N, test_N = fitted(pairs, differences_ND, l2s, seed)
    ones, prompts = np.ones(int(test_N.sum())), only(pairs.prompts_N, test_N)
    width, mass = (calibration(margins_N, ones, prompts, equal_mass=equal) for equal in (False, True))
    right_N = (margins_N > 0) + 0.5 * (margins_N == 0)
    within = [right_N[in_N[test_N]].mean() for in_N in strata]
    return [right_N.mean(), *within, log_losses(margins_N, ones).mean(), width.error, mass.error, width.by_chance]


def fitted(pairs: RealPairs, differences_ND: Array, l2s: Sequence[float], seed: int) -> tuple[Array, NDArray[np.bool_]]:
    """Margins on the test pairs, and which these are. The ridge is the one that the choosing pairs like best."""
    train_N, choose_N, test_N = split(pairs.prompts_N, seed)
    train = differences_ND[train_N], np.ones(int(train_N.sum()))
    weights = [linear.fit_bradley_terry(*train, l2=l2) for l2 in l2s]
    ones = np.ones(int(choose_N.sum()))
    losses = [log_losses(differences_ND[choose_N] @ each, ones).mean() for each in weights]
    return differences_ND[test_N] @ weights[int(np.argmin(losses))], test_N


def one_test(pairs: RealPairs, *, seed: int) -> tuple[Array, Array, list[str]]:
    margins_N, test_N = fitted(pairs, pairs.features_NH, linear.L2S, seed)
    return margins_N, np.ones(len(margins_N)), only(pairs.prompts_N, test_N)


def word_counts(rows: Sequence[Comparison]) -> NDArray[np.int64]:
    """Words [N, 2] of chosen and rejected."""
    return np.array([[len(row.chosen.split()), len(row.rejected.split())] for row in rows])
