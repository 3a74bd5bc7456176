"""What aggregation gains over the majority, on panels of which the truth is known."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.feedback.intervals import Array, interval
from contracts.preferences import SimulatedVotes, VoterGroup
from feedback.quality import Aggregate, dawid_skene, majority
from feedback.simulate import Pair, simulate_votes

PANELS = {"20 % random, 20 % hostile": (0.2, 0.2), "40 % random": (0.4, 0.0), "all good": (0.0, 0.0)}


GOLD_PAIRS = 100


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
