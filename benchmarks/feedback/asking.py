"""What choosing questions saves: a small logistic model learns from labels in the order they were asked for."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.feedback.crowd import crowd_votes
from benchmarks.feedback.intervals import Array, interval, sigmoid
from feedback.formats import read_preferences
from feedback.quality import dawid_skene
from feedback.sampling import (
    PRIOR_PRECISION,
    ask_at_random,
    ask_to_predict,
    ask_uncertain,
    ask_uncertain_and_diverse,
    disagreement,
    laplace_covariance,
    variety,
)
from feedback.text_features import text_differences

MEMBERS, BATCH = 16, 32


@dataclass
class Learning:
    """A model as it learns, and all that a way of asking may look at: the labels that wait are not used by any."""

    x_PD: Array
    y_P: Array
    pool: NDArray[np.intp]
    ridge: float
    seed: int
    different_P: Array
    known: NDArray[np.intp]
    theta_D: Array
    members_ED: Array
    weights_EP: Array  # Rubin 1981, "The Bayesian Bootstrap"

    def learn(self) -> None:
        ones = np.ones(len(self.known))
        self.theta_D = logistic(self.x_PD[self.known], self.y_P[self.known], ones, self.ridge, self.theta_D, steps=5)

    def uncertainty(self, rest: NDArray[np.intp]) -> Array:
        x_ND, y_N = self.x_PD[self.known], self.y_P[self.known]
        for member, weights_P in enumerate(self.weights_EP):
            theta = self.members_ED[member]
            self.members_ED[member] = logistic(x_ND, y_N, weights_P[self.known], self.ridge, theta, steps=2)
        return disagreement(sigmoid(self.members_ED @ self.x_PD[rest].T))

    def to_predict(self, rest: NDArray[np.intp], *, with_labels: bool) -> NDArray[np.intp]:
        theta = self.theta_D if with_labels else np.zeros_like(self.theta_D)
        known_ND, pool_PD = self.x_PD[self.known], self.x_PD[self.pool]
        covariance = laplace_covariance(known_ND, sigmoid(known_ND @ theta), ridge=self.ridge)
        target = pool_PD.T @ pool_PD / len(pool_PD)
        return ask_to_predict(self.x_PD[rest], sigmoid(self.x_PD[rest] @ theta), covariance, BATCH, target_DD=target)


Pick = Callable[[Learning, NDArray[np.intp]], NDArray[np.intp]]  # which of the rest, by their place in it
WAYS: dict[str, Pick] = {
    "random": lambda model, rest: ask_at_random(len(rest), BATCH, seed=model.seed),
    "uncertainty": lambda model, rest: ask_uncertain(model.uncertainty(rest), BATCH),
    "uncertainty, diverse": lambda model, rest: ask_uncertain_and_diverse(
        model.uncertainty(rest), model.x_PD[rest], BATCH
    ),
    "where responses vary": lambda model, rest: ask_uncertain(model.different_P[rest], BATCH),
    "to predict": lambda model, rest: model.to_predict(rest, with_labels=True),
    "to predict, before any label": lambda model, rest: model.to_predict(rest, with_labels=False),
}


def asking(arguments: argparse.Namespace) -> None:
    """Labels until the model has 95 % of the gain over chance that the whole pool gives, for each way of asking."""
    texts_a, texts_b, prompts, features_PD, a_better_P, ridge = SETS[arguments.set](arguments.data)
    first = arguments.first_seed
    seeds = range(first, first + (arguments.seeds or 40))
    different_P = variety(texts_a, texts_b)
    curves = {}
    for way, pick in WAYS.items():
        found = [learning_curve(pick, features_PD, a_better_P, prompts, ridge, different_P, seed) for seed in seeds]
        batches = min(len(shares) for shares in found)  # splits by prompt differ in pairs
        curves[way] = np.array([shares[:batches] for shares in found])
    print(f"{len(a_better_P)} labelled pairs, {len(set(prompts))} prompts, a quarter of them held out; ", end="")
    print(f"{len(seeds)} seeds; {features_PD.shape[1]} features, ensemble of {MEMBERS}, {BATCH} labels at a time\n")
    print(
        "| asking | right with the whole pool, % | with 1/4 of the labels | with 1/2 | points more than random, mean ",
        end="",
    )
    print("of the curve | labels for 95 % of the gain | of random's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rng = np.random.default_rng(0)
    draws = [np.arange(len(seeds)), *rng.integers(0, len(seeds), (2000, len(seeds)))]
    # what the whole pool gives is the same for each way, so it is random's in all
    whole = [curves["random"][draw][:, -1].mean() for draw in draws]
    random = np.array([labels_needed(curves["random"][draw], end) for draw, end in zip(draws, whole, strict=True)])
    for way, curve in curves.items():
        needed = np.array([labels_needed(curve[draw], end) for draw, end in zip(draws, whole, strict=True)])
        steps = curve.shape[1]
        cells = [f"{100 * curve[:, step].mean():.1f}" for step in (-1, steps // 4, steps // 2)]
        more = 100 * (curve - curves["random"]).mean(axis=1)
        cells.append("0" if way == "random" else interval(more, "+.2f"))
        ratio = needed / random
        low, high = np.quantile(ratio[1:], (0.025, 0.975))
        cells += [f"{needed[0]}", "1" if way == "random" else f"{ratio[0]:.2f} ({low:.2f} to {high:.2f})"]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


def learning_curve(
    pick: Pick,
    features_PD: Array,
    a_better_P: Array,
    prompts: Sequence[str],
    ridge: float,
    different_P: Array,
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
    weights_EP = rng.exponential(size=(MEMBERS, len(y_P)))
    nothing_D, nothing_ED = np.zeros(x_PD.shape[1]), np.zeros((MEMBERS, x_PD.shape[1]))
    model = Learning(x_PD, y_P, pool, ridge, seed, different_P, pool[:BATCH], nothing_D, nothing_ED, weights_EP)
    shares = []
    while True:
        model.learn()
        shares.append(float(((x_PD[test_P] @ model.theta_D > 0) == (y_P[test_P] > 0.5)).mean()))
        rest = np.setdiff1d(pool, model.known)
        if not len(rest):
            return shares
        model.known = np.concatenate([model.known, rest[pick(model, rest)]])


def labels_needed(shares_SK: Array, whole: float) -> int:
    """Labels at which the mean curve first has 95 % of what the `whole` pool gains over chance; all where it never has.

    The curve is averaged over five batches: a first crossing of what wavers comes too early.
    """
    smooth_K = np.convolve(np.pad(shares_SK.mean(axis=0), 2, mode="edge"), np.full(5, 0.2), mode="valid")
    enough_K = smooth_K >= 0.5 + 0.95 * (whole - 0.5)
    return BATCH * (1 + int(np.argmax(enough_K)) if enough_K.any() else len(enough_K))


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
        PRIOR_PRECISION,
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
