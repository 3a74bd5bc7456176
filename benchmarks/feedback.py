"""Trusting and asking: what aggregation gains on votes, simulated and real, and what choosing questions saves.

    python -m benchmarks.feedback reliability [--seeds 20]
    python -m benchmarks.feedback crowd [--data FOLDER]
    python -m benchmarks.feedback asking [--set harmless|crowd] [--seeds 20] [--data FOLDER]
    python -m benchmarks.feedback speed [--judgments 100000]
    python -m benchmarks.feedback store [--judgments 100000]

`reliability` draws panels of good (right 80 %), random and hostile (right 20 %) voters, 1,000 pairs with 5 votes.
`crowd` hides a fifth of real crowd votes and lets each method foretell them. `asking` trains a small logistic model on
labels in the order in which each way asks for them, with frozen features of the texts. `speed` aggregates many votes.
`store` writes votes one by one, each synced to disk before it is acknowledged, then many at once, and aggregates them.
The real sets are read from ../shared/data. Intervals are 95 %. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.doctor.software import versions
from contracts.config import SimulatedVotes, VoterGroup
from feedback.annotators import krippendorff_alpha, side_bias
from feedback.ballots import TIE, A, B, Ballots
from feedback.crowd_bt import CrowdBradleyTerry, crowd_bradley_terry
from feedback.formats import read_preferences
from feedback.quality import Aggregate, dawid_skene, majority, predicted_choices
from feedback.sampling import (
    ask_at_random,
    ask_uncertain,
    ask_uncertain_and_diverse,
    disagreement,
    variety,
)
from feedback.simulate import Pair, simulate_votes
from feedback.store import DatasetQuery, Judgment, Store

DATA = Path(__file__).parents[2] / "shared" / "data"
PANELS = {"20 % random, 20 % hostile": (0.2, 0.2), "40 % random": (0.4, 0.0), "all good": (0.0, 0.0)}
GOLD_PAIRS = 100
MEMBERS, BATCH, DIMENSIONS = 16, 32, 32  # of `asking`

Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["reliability", "crowd", "asking", "speed", "store"])
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--set", choices=["harmless", "crowd"], default="harmless")
    parser.add_argument("--judgments", type=int, default=100_000)
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`python -m benchmarks.feedback {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores\n")
    {"reliability": reliability, "crowd": crowd, "asking": asking, "speed": speed, "store": store}[arguments.what](
        arguments
    )


def reliability(arguments: argparse.Namespace) -> None:
    """Share of pairs on which the aggregate is right, and how far its probabilities can be believed."""
    seeds = range(arguments.seeds or 20)
    print(f"{len(seeds)} seeds; gold: {GOLD_PAIRS} of the 1,000 pairs have a known answer and are not scored\n")
    print("| panel | votes a voter | majority right, % | aggregate right, % | points more | ", end="")
    print("points more with gold | log loss: majority | aggregate | calibration error |")
    print("| --- " + "| ---: " * 8 + "|", flush=True)
    for votes_each in (100, 25, 10):
        for panel, shares in PANELS.items():
            rows, stated, right = [], [], []
            for seed in seeds:
                truth, votes = simulated(shares, voters=5000 // votes_each, seed=seed)
                gold = {pair: "a" if truth[pair] else "b" for pair in list(truth)[:GOLD_PAIRS]}
                checked = dawid_skene(votes, gold=gold)  # type: ignore[arg-type]
                unknown = {pair: side for pair, side in truth.items() if pair not in gold}
                counted, learned = majority(votes), dawid_skene(votes)
                shares_right = [share_right(found, truth) for found in (counted, learned)]
                with_gold = share_right(checked, unknown) - share_right(counted, unknown)
                rows.append([*shares_right, shares_right[1] - shares_right[0], with_gold])
                rows[-1] += [log_loss(found, truth) for found in (counted, learned)]
                stated += [learned.probability_a[pair] for pair in truth]
                right += list(truth.values())
            columns = list(zip(*rows, strict=True))
            cells = [f"{100 * np.mean(column):.1f}" for column in columns[:2]]
            cells += [interval(100 * np.array(column), "+.1f") for column in columns[2:4]]
            cells += [f"{np.mean(column):.3f}" for column in columns[4:]]
            cells.append(f"{calibration_error(np.array(stated), np.array(right)):.3f}")
            print(f"| {panel} | {votes_each} | {' | '.join(cells)} |", flush=True)


def simulated(bad: tuple[float, float], *, voters: int, seed: int, pairs: int = 1000) -> tuple[dict[str, bool], Any]:
    """Which pairs are better on side a, and 5 votes each."""
    random, hostile = (round(voters * share) for share in bad)
    groups = {"good": (voters - random - hostile, 0.8), "random": (random, 0.5), "hostile": (hostile, 0.2)}
    panel = {name: VoterGroup(count=count, accuracy=right) for name, (count, right) in groups.items() if count}
    gold_a = np.random.default_rng([seed, 1]).choice((-1.0, 1.0), pairs)
    asked = [Pair(f"{i:06d}", f"p{i}", f"question {i}", f"a{i}", f"b{i}") for i in range(pairs)]
    config = SimulatedVotes(gold="examples.judges:vader", votes_per_pair=5, voters=panel)
    votes = simulate_votes(asked, gold_a.tolist(), [0.0] * pairs, config, seed=seed)
    return {pair.pair_id: bool(score > 0) for pair, score in zip(asked, gold_a, strict=True)}, votes


def share_right(aggregate: Aggregate, truth: dict[str, bool]) -> float:
    found = [aggregate.probability_a[pair] for pair in truth]
    return float(
        np.mean([0.5 if p == 0.5 else (p > 0.5) == side for p, side in zip(found, truth.values(), strict=True)])
    )


def log_loss(aggregate: Aggregate, truth: dict[str, bool]) -> float:
    return float(
        np.mean(
            [-np.log(aggregate.probability_a[p] if a else 1 - aggregate.probability_a[p]) for p, a in truth.items()]
        )
    )


def calibration_error(probability_N: Array, truth_N: NDArray[np.bool_]) -> float:
    """Mean distance over ten bins of confidence between what is said and what is so, weighted by size."""
    said_N = np.maximum(probability_N, 1 - probability_N)
    right_N = np.where(probability_N == 0.5, 0.5, (probability_N > 0.5) == truth_N)
    bins_N = np.minimum(((said_N - 0.5) * 20).astype(int), 9)
    return float(sum(abs((said_N - right_N)[bins_N == b].sum()) for b in range(10)) / len(said_N))


def crowd(arguments: argparse.Namespace) -> None:
    """Held-out votes of a real crowd, 10 splits; then the position bias and the panel."""
    ballots, rows = crowd_votes(arguments.data)
    items = {row["id"]: tuple(f"{row['prompt']}/{row[side]}" for side in ("model_x", "model_y")) for row in rows}
    losses: dict[str, list[list[float]]] = {}
    for seed in range(arguments.seeds or 10):
        held_out = np.random.default_rng(seed).random(len(rows)) < 0.2
        known, asked = ballots.select(~held_out), ballots.select(held_out)
        for method, predicted_N3 in foretold(known, asked, items).items():
            losses.setdefault(method, []).append(vote_losses(predicted_N3, asked))
    print("| method | log loss of a vote: a, b or tie | of a vote for a side | with ties as half a vote each way |")
    print("| --- | ---: | ---: | ---: |")
    for method, found in losses.items():
        cells = [interval(np.array(column), ".3f") for column in zip(*found, strict=True)]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    best = min((name for name in losses if name.startswith("majority")), key=lambda name: np.mean(losses[name], 0)[0])
    for name in list(losses)[-3:]:
        gains = np.array(losses[best]) - np.array(losses[name])
        print(f"\n{best} less {name}: {', '.join(interval(gain, '+.3f') for gain in gains.T)}")
    describe_crowd(ballots, items)


def foretold(known: Ballots, asked: Ballots, items: dict[str, Any]) -> dict[str, Array]:
    """(N, 3): probabilities of a, tie, b for each held-out vote. Crowd-BT knows no ties: NaN there."""
    counts_P3 = np.stack([known.counts_P(choice) for choice in (A, TIE, B)], axis=1).astype(float)
    base = counts_P3.sum(axis=0) / counts_P3.sum()
    base = (base + base[::-1]) / 2
    found = {"base rates": np.tile(base, (len(asked.pairs_N), 1))}
    for weight in (1, 2, 4, 8):
        smoothed = (counts_P3 + weight * base) / (counts_P3.sum(axis=1, keepdims=True) + weight)
        found[f"majority + {weight} votes of the base rates"] = smoothed[asked.pairs_N]
    pairs = [asked.pair_ids[pair] for pair in asked.pairs_N]
    voters = [asked.voters[voter] for voter in asked.voters_N]
    found["Dawid-Skene"] = predicted_choices(dawid_skene(known), pairs, voters)
    found["Crowd-BT, pairs by themselves"] = _bt_choices(crowd_bradley_terry(known), None, asked)
    found["Crowd-BT, a strength a response"] = _bt_choices(crowd_bradley_terry(known, items), items, asked)
    return found


def _bt_choices(model: CrowdBradleyTerry, items: dict[str, Any] | None, asked: Ballots) -> Array:
    sides = [items[pair] if items else (f"{pair}/a", f"{pair}/b") for pair in asked.pair_ids]
    margin_P = np.array([model.strength.get(a, 0.0) - model.strength.get(b, 0.0) for a, b in sides])
    mean = float(np.mean(list(model.skill.values())))
    skill_N = np.array([model.skill.get(voter, mean) for voter in asked.voters])[asked.voters_N]
    left_N = model.position_bias * asked.left_N
    a_N = skill_N * sigmoid(margin_P[asked.pairs_N] + left_N)
    a_N += (1 - skill_N) * sigmoid(left_N - margin_P[asked.pairs_N])
    return np.stack([a_N, np.full_like(a_N, np.nan), 1 - a_N], axis=1)


def vote_losses(predicted_N3: Array, asked: Ballots) -> list[float]:
    """Nats a vote: of all three outcomes, of a or b given that it is one, of a with ties as half."""
    said_N = np.array([0, 2, 1])[asked.choices_N]
    all_three = -np.log(predicted_N3[np.arange(len(said_N)), said_N]).mean()
    sides_N2 = predicted_N3[:, ::2] / predicted_N3[:, ::2].sum(axis=1, keepdims=True)
    decided_N = said_N != 1
    of_sides = -np.log(sides_N2[decided_N, said_N[decided_N] // 2]).mean()
    soft_a_N = predicted_N3[:, 0] + np.nan_to_num(predicted_N3[:, 1]) / 2
    target_N = np.array([1.0, 0.5, 0.0])[said_N]
    soft = -(target_N * np.log(soft_a_N) + (1 - target_N) * np.log(1 - soft_a_N)).mean()
    return [float(all_three), float(of_sides), float(soft)]


def describe_crowd(ballots: Ballots, items: dict[str, Any]) -> None:
    picks_N = ballots.signs_N * ballots.left_N
    left, decided = int((picks_N > 0).sum()), int((picks_N != 0).sum())
    rng = np.random.default_rng(0)
    biases = []
    for _ in range(40):  # voters, not votes, are independent
        drawn = [
            np.flatnonzero(ballots.voters_N == v) for v in rng.integers(0, len(ballots.voters), len(ballots.voters))
        ]
        sample = ballots.select(np.concatenate(drawn))
        copies_N = np.repeat(np.arange(len(drawn)), [len(votes) for votes in drawn])
        names = [str(copy) for copy in range(len(drawn))]
        columns = (sample.pairs_N, copies_N, sample.choices_N, sample.left_N, sample.active_s_N)
        biases.append(crowd_bradley_terry(Ballots(ballots.pair_ids, names, *columns), items).position_bias)
    low, high = np.quantile(biases, (0.025, 0.975))
    whole = crowd_bradley_terry(ballots, items)
    skills = np.array(list(dawid_skene(ballots).reliability.values()))
    print(f"\n{len(ballots.pairs_N)} votes, {len(ballots.voters)} voters, {len(ballots.pair_ids)} pairs; ", end="")
    print(f"{(ballots.choices_N == TIE).mean():.0%} ties; left picked in {left} of {decided} votes for a side ", end="")
    print(
        f"({left / decided:.1%}). Crowd-BT's position bias: {whole.position_bias:+.3f} log odds, standard error ",
        end="",
    )
    print(
        f"{whole.position_bias_error:.3f}; {low:+.3f} to {high:+.3f} over 40 resampled panels: two equal responses ",
        end="",
    )
    print(f"would be picked left {sigmoid(np.array(whole.position_bias)):.1%} of the time.", end="")
    print(f"\n\nKrippendorff's alpha {krippendorff_alpha(ballots):.2f}; reliabilities: ", end="")
    print(
        f"{(skills < 0.5).sum()} voters below 0.5, median {np.median(skills):.2f}; {len(side_bias(ballots))} flagged ",
        end="",
    )
    print("for a side (not a valid test here: each pair was shown in one order only).")


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


def speed(arguments: argparse.Namespace) -> None:
    """Seconds and memory for many votes: 5 a pair, 500 voters, some bad; a tenth are ties."""
    count = arguments.judgments
    rng = np.random.default_rng(0)
    pairs = np.arange(count) // 5
    voters = (pairs * 5 + rng.integers(0, 100, len(pairs)) * 5 + np.arange(count) % 5) % 500
    right = rng.random(count) < np.where(voters < 50, 0.2, np.where(voters < 150, 0.5, 0.8))
    choices = np.where(rng.random(count) < 0.1, "tie", np.where(right == ((pairs % 2) == 0), "a", "b"))
    columns = ([f"{p:07d}" for p in pairs.tolist()], [f"{v:03d}" for v in voters.tolist()], choices.tolist())
    left = np.where(rng.random(count) < 0.5, "a", "b").tolist()
    seconds = rng.lognormal(3, 0.5, count)
    Ballots.from_columns(["x"], ["y"], ["a"])  # what the first call loads is no part of it
    print("| step | seconds | of the processor | peak memory more, MiB |\n| --- | ---: | ---: | ---: |")
    ballots = timed("columns to arrays", lambda: Ballots.from_columns(*columns, left=left, active_s=seconds))
    timed("majority", lambda: majority(ballots))
    found = timed("Dawid-Skene", lambda: dawid_skene(ballots))
    strengths = timed("Crowd-BT, pairs by themselves", lambda: crowd_bradley_terry(ballots))
    timed("alpha and side flags", lambda: (krippendorff_alpha(ballots), side_bias(ballots)))
    print(f"\n{len(ballots.pairs_N):,} votes, {len(ballots.pair_ids):,} pairs, {len(ballots.voters)} voters; ", end="")
    print(f"{found.iterations} and {strengths.iterations} iterations")


def store(arguments: argparse.Namespace) -> None:
    """Votes a second, acknowledged when they are synced; seconds from many votes in the store to probabilities."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        print(f"fsync of 4 KiB there: {1000 * fsync_s(Path(folder)):.2f} ms, the median of 100\n")
        print("| one by one | votes | a second | of the processor, ms each |\n| --- | ---: | ---: | ---: |")
        with Store(Path(folder) / "asked.db") as asked:
            pairs = [Pair(f"{n:07d}", "", f"question {n}", "x", "y") for n in range(5000)]
            asked.add_pairs(pairs, source="file", required_votes=5)
            for threads in (1, 8):
                one_by_one(asked, threads)
        print("\n| many at once | seconds | of the processor | peak memory more, MiB |")
        print("| --- | ---: | ---: | ---: |")
        with Store(Path(folder) / "many.db") as many:
            bulk(many, Path(folder), arguments.judgments)
            print(f"\nthe file of the store: {(Path(folder) / 'many.db').stat().st_size / 2**20:.0f} MiB")


def fsync_s(folder: Path) -> float:
    took = []
    with (folder / "synced").open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 4096)
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - start)
    return float(np.median(took))


def one_by_one(asked: Store, threads: int) -> None:
    """Each thread is an annotator who asks for a task and votes, 200 times."""
    people = [asked.register(f"{threads}-{number}")[0] for number in range(threads)]

    def work(annotator: int) -> None:
        for _ in range(200):
            given = asked.next_task(annotator)
            if given is None:
                raise RuntimeError("there are fewer tasks than votes")
            asked.submit(annotator, given.task_id, Judgment(given.lease_id, choice="a"), lease_id=given.lease_id)

    start, start_cpu, votes = time.perf_counter(), time.process_time(), 200 * threads
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, people))
    took_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    print(f"| asked, then voted: {threads} at once | {votes} | {votes / took_s:.0f} | {1000 * cpu_s / votes:.1f} |")


def bulk(many: Store, folder: Path, count: int) -> None:
    pairs = [Pair(f"{n:07d}", "", f"question {n}", f"x {n}", f"y {n}") for n in range(count // 5)]
    panel = {"good": VoterGroup(count=400, accuracy=0.8), "random": VoterGroup(count=100, accuracy=0.5)}
    config = SimulatedVotes(gold="examples.judges:vader", votes_per_pair=5, voters=panel)
    votes = simulate_votes(pairs, [float(n % 2) for n in range(len(pairs))], [0.5] * len(pairs), config, seed=0)
    timed(f"{len(pairs):,} pairs in", lambda: many.add_pairs(pairs, source="live", required_votes=5))
    timed(f"{len(votes):,} votes in", lambda: many.add_votes(votes))
    timed("votes out, as arrays", many.ballots)
    timed("majority, from store to store", lambda: many.aggregate(method="majority"))
    run = timed("Dawid-Skene, from store to store", many.aggregate)
    exported, query = folder / "exported.parquet", DatasetQuery(run.aggregate_id)
    timed("preferences out, Parquet", lambda: many.export_preferences("all", query, exported))
    with Store(folder / "imported.db") as imported:
        timed("preferences in, Parquet", lambda: imported.import_preferences(exported))


def timed(name: str, work: Callable[[], Any]) -> Any:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    result = work()
    took_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    more_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    print(f"| {name} | {took_s:.2f} | {cpu_s:.2f} | {more_kib / 1024:.0f} |", flush=True)
    return result


def crowd_votes(data: Path) -> tuple[Ballots, list[dict[str, str]]]:
    path = data / "crowd_votes.jsonl.gz"
    if not path.exists():
        raise SystemExit(f"{path} is missing: give --data the folder with the crowd votes")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    names = {"left": "a", "right": "b", "tie": "tie"}
    columns = ([row["id"] for row in rows], [row["worker"] for row in rows], [names[row["winner"]] for row in rows])
    return Ballots.from_columns(*columns, left=["a"] * len(rows)), rows


def interval(values: Array, form: str) -> str:
    """Mean and 95 % interval of independent repetitions (Student's t, 1.96 beyond 30)."""
    t = {10: 2.262, 20: 2.093}.get(len(values), 1.96 + 3 / len(values))
    half = t * values.std(ddof=1) / np.sqrt(len(values))
    if np.isnan(half):
        return "-"
    return f"{values.mean():{form}} ({values.mean() - half:{form}} to {values.mean() + half:{form}})"


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


if __name__ == "__main__":
    main()
