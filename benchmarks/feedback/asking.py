"""What choosing questions saves: a small logistic model learns from labels in the order they were asked for."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.feedback.crowd import crowd_votes
from benchmarks.feedback.intervals import Array, sigmoid
from feedback.formats import read_preferences
from feedback.quality import dawid_skene
from feedback.sampling import (
    ask_at_random,
    ask_uncertain,
    ask_uncertain_and_diverse,
    disagreement,
    variety,
)

MEMBERS, BATCH, DIMENSIONS = 16, 32, 32


def asking(arguments: argparse.Namespace) -> None:
    """Labels until the model has 95 % of the gain over chance that the whole pool gives, for each way of asking."""
    texts_a, texts_b, prompts, features_PD, a_better_P, ridge = SETS[arguments.set](arguments.data)
    seeds = range(arguments.seeds or 20)
    different_P = variety(texts_a, texts_b)
    ways: dict[str, Callable[[Array, NDArray[np.intp], int], NDArray[np.intp]]] = {
        "random": lambda uncertainty, rest, seed: ask_at_random(len(rest), BATCH, seed=seed),
        "uncertainty": lambda uncertainty, rest, seed: ask_uncertain(uncertainty, BATCH),
        "uncertainty, diverse": lambda uncertainty, rest, seed: ask_uncertain_and_diverse(
            uncertainty, features_PD[rest], BATCH
        ),
        "where responses vary": lambda uncertainty, rest, seed: ask_uncertain(different_P[rest], BATCH),
    }
    curves = {}
    for way, pick in ways.items():
        found = [learning_curve(pick, features_PD, a_better_P, prompts, ridge, seed) for seed in seeds]
        batches = min(len(shares) for shares in found)  # splits by prompt differ in pairs
        curves[way] = np.array([shares[:batches] for shares in found])
    print(f"{len(a_better_P)} labelled pairs, {len(set(prompts))} prompts, a quarter of them held out; ", end="")
    print(f"{len(seeds)} seeds; {features_PD.shape[1]} features, ensemble of {MEMBERS}, {BATCH} labels at a time\n")
    print("| asking | right with the whole pool, % | with 1/4 of the labels | with 1/2 ", end="")
    print("| labels for 95 % of the gain | of random's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    rng = np.random.default_rng(0)
    draws = [np.arange(len(seeds)), *rng.integers(0, len(seeds), (2000, len(seeds)))]
    random = np.array([labels_needed(curves["random"][draw]) for draw in draws])
    for way, curve in curves.items():
        needed = np.array([labels_needed(curve[draw]) for draw in draws])
        steps = curve.shape[1]
        cells = [f"{100 * curve[:, step].mean():.1f}" for step in (-1, steps // 4, steps // 2)]
        ratio = needed / random
        low, high = np.quantile(ratio[1:], (0.025, 0.975))
        cells += [f"{needed[0]}", "1" if way == "random" else f"{ratio[0]:.2f} ({low:.2f} to {high:.2f})"]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


def learning_curve(
    pick: Callable[..., NDArray[np.intp]],
    features_PD: Array,
    a_better_P: Array,
    prompts: Sequence[str],
    ridge: float,
    seed: int,
) -> list[float]:
    """Share right on held-out prompts after each batch of labels, until none is left."""
    rng = np.random.default_rng(seed)
    names, group_P = np.unique(np.array(prompts), return_inverse=True)
    order = rng.permutation(len(names))
    test_P = np.isin(group_P, order[: len(names) // 4])
    # which side is called a carries nothing
    flipped_P = rng.random(len(a_better_P)) < 0.5
    x_PD = np.where(flipped_P[:, None], -features_PD, features_PD)
    y_P = np.where(flipped_P, 1 - a_better_P, a_better_P)
    pool = rng.permutation(np.flatnonzero(~test_P))
    weights_EP = rng.exponential(size=(MEMBERS, len(y_P)))  # Rubin 1981, "The Bayesian Bootstrap"
    known = pool[:BATCH]
    theta, members_ED = np.zeros(x_PD.shape[1]), np.zeros((MEMBERS, x_PD.shape[1]))
    shares = []
    while True:
        theta = logistic(x_PD[known], y_P[known], np.ones(len(known)), ridge, theta, steps=5)
        shares.append(float(((x_PD[test_P] @ theta > 0) == (y_P[test_P] > 0.5)).mean()))
        rest = np.setdiff1d(pool, known)
        if not len(rest):
            return shares
        for member, weights_P in enumerate(weights_EP):
            members_ED[member] = logistic(x_PD[known], y_P[known], weights_P[known], ridge, members_ED[member], steps=2)
        asked = pick(disagreement(sigmoid(members_ED @ x_PD[rest].T)), rest, seed)
        known = np.concatenate([known, rest[asked]])


def labels_needed(shares_SK: Array) -> int:
    """Labels at which the mean curve first has 95 % of what it gains over chance at its end.

    The curve is averaged over five batches: a first crossing of what wavers comes too early.
    """
    mean_K = shares_SK.mean(axis=0)
    smooth_K = np.convolve(np.pad(mean_K, 2, mode="edge"), np.full(5, 0.2), mode="valid")
    return BATCH * (1 + int(np.argmax(smooth_K >= 0.5 + 0.95 * (mean_K[-1] - 0.5))))


def logistic(x_ND: Array, y_N: Array, weights_N: Array, ridge: float, theta: Array, *, steps: int) -> Array:
    """Newton's method from `theta`."""
    for _ in range(steps):
        p_N = sigmoid(x_ND @ theta)
        gradient = x_ND.T @ (weights_N * (y_N - p_N)) - ridge * theta
        hessian = (x_ND * (weights_N * p_N * (1 - p_N))[:, None]).T @ x_ND + ridge * np.eye(len(theta))
        theta = theta + np.linalg.solve(hessian, gradient)
    return theta


def harmless_pairs(data: Path) -> tuple[list[str], list[str], list[str], Array, Array, float]:
    """HH-RLHF's harmless pairs; TF-IDF of words and pairs of words, their main directions."""
    pairs, _ = read_preferences(data / "hh_harmless_pairs.jsonl.gz")
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    return (
        chosen,
        rejected,
        [pair.prompt for pair in pairs],
        text_differences(chosen, rejected),
        np.ones(len(pairs)),
        100.0,
    )


def crowd_pairs(data: Path) -> tuple[list[str], list[str], list[str], Array, Array, float]:
    """LLMFAO's pairs that the crowd decided; who wrote them, and how long they are."""
    ballots, rows = crowd_votes(data)
    decided = {pair: p for pair, p in dawid_skene(ballots).probability_a.items() if p != 0.5}
    models = {row["id"]: (row["model_x"], row["model_y"]) for row in rows}
    names = sorted({name for both in models.values() for name in both})
    with gzip.open(data / "crowd_pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = {str(row["id"]): row for row in map(json.loads, lines)}
    first, second = ([texts[pair][side] for pair in decided] for side in ("result_x", "result_y"))
    wrote = np.array([[float(name == x) - float(name == y) for name in names] for x, y in (models[p] for p in decided)])
    length = np.array([np.log1p(len(a.split())) - np.log1p(len(b.split())) for a, b in zip(first, second, strict=True)])
    features = np.concatenate([wrote, length[:, None]], axis=1)
    prompts = [str(texts[pair]["prompt"]) for pair in decided]
    return first, second, prompts, features, np.array([float(p > 0.5) for p in decided.values()]), 3.0


SETS = {"harmless": harmless_pairs, "crowd": crowd_pairs}


def text_differences(texts_a: Sequence[str], texts_b: Sequence[str], *, width: int = 4096) -> Array:
    """(P, DIMENSIONS): differences of hashed TF-IDF, on their leading singular vectors, without labels."""
    counts = np.zeros((len(texts_a) + len(texts_b), width), dtype=np.float32)
    for row, text in zip(counts, [*texts_a, *texts_b], strict=True):
        words = text.lower().split()
        for term in words + [f"{one} {two}" for one, two in itertools.pairwise(words)]:
            row[zlib.crc32(term.encode()) % width] += 1
    weighted = np.log1p(counts) * (np.log((1 + len(counts)) / (1 + (counts > 0).sum(axis=0))) + 1)
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)
    difference = weighted[: len(texts_a)] - weighted[len(texts_a) :]
    # Halko, Martinsson & Tropp 2011, "Finding Structure with Randomness", algorithm 4.4
    basis = difference.T @ np.random.default_rng(0).normal(size=(len(difference), DIMENSIONS + 20))
    for _ in range(3):
        basis = difference.T @ (difference @ np.linalg.qr(basis)[0])
    left, values, _ = np.linalg.svd(difference @ np.linalg.qr(basis)[0], full_matrices=False)
    features = (left * values)[:, :DIMENSIONS]
    return np.asarray(features / features.std(), dtype=np.float64)
