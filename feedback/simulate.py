"""A panel of simulated voters, for runs without people: some careful, some careless, some hostile.

The gold judge's scores come from the caller and never leave as scores: what a vote tells about them is
one noisy choice. Names say `simulated-`, so that nobody takes these voters for people.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from contracts.preferences import SimulatedVotes

Side = Literal["a", "b"]
Choice = Literal["a", "b", "tie", "both_bad", "skip"]


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, to be compared."""

    pair_id: str
    prompt_id: str
    prompt: str
    response_a: str
    response_b: str
    domain: str = ""


@dataclass(frozen=True)
class Vote:
    """One voter's choice. `left` is the response that was shown on the left, None where nobody knows; `active_s` the
    seconds the voter spent on it. A skip says nothing about the pair."""

    pair_id: str
    voter: str
    choice: Choice
    left: Side | None
    active_s: float | None = None


def simulate_votes(
    pairs: Sequence[Pair],
    gold_a: Sequence[float],
    gold_b: Sequence[float],
    config: SimulatedVotes,
    *,
    seed: int,
) -> list[Vote]:
    """`votes_per_pair` votes a pair, by distinct voters; the same seed gives the same votes.

    Loads are balanced: over the whole panel they differ by at most one vote. A voter picks the response with
    the higher gold score with the `accuracy` of its group; equal scores make everybody vote "tie".

    Args:
        gold_a: the hidden judge's score of each `response_a`, higher is better.
        gold_b: the same for each `response_b`.

    Raises:
        ValueError: scores that are missing or not finite, a pair id used twice.
    """
    _check(pairs, gold_a, gold_b)
    rng = np.random.default_rng(seed)
    panel = _panel(config)
    loads = np.zeros(len(panel), dtype=np.int64)
    votes = []
    for pair, score_a, score_b in zip(pairs, gold_a, gold_b, strict=True):
        # least loaded first, equals in random order
        chosen = np.lexsort((rng.random(len(panel)), loads))[: config.votes_per_pair]
        loads[chosen] += 1
        for voter, agree, left in zip(chosen, rng.random(len(chosen)), rng.random(len(chosen)), strict=True):
            name, accuracy = panel[voter]
            choice = _choice(score_a, score_b, agrees=bool(agree < accuracy))
            votes.append(Vote(pair.pair_id, name, choice, "a" if left < 0.5 else "b"))
    return votes


def _panel(config: SimulatedVotes) -> list[tuple[str, float]]:
    """Name and accuracy of every voter, numbered from 1 within its group."""
    return [
        (f"simulated-{kind}-{number:02d}", group.accuracy)
        for kind, group in config.voters.items()
        for number in range(1, group.count + 1)
    ]


def _choice(score_a: float, score_b: float, *, agrees: bool) -> Choice:
    if score_a == score_b:
        return "tie"
    return "a" if (score_a > score_b) == agrees else "b"


def _check(pairs: Sequence[Pair], gold_a: Sequence[float], gold_b: Sequence[float]) -> None:
    for name, scores in (("gold_a", gold_a), ("gold_b", gold_b)):
        if len(scores) != len(pairs):
            raise ValueError(f"{name} has {len(scores)} scores for {len(pairs)} pairs")
        for pair, score in zip(pairs, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(f"{name} of pair {pair.pair_id!r} is {score}, allowed is a finite score")
    seen: set[str] = set()
    for pair in pairs:
        if pair.pair_id in seen:
            raise ValueError(f"pair_id {pair.pair_id!r} is used twice")
        seen.add(pair.pair_id)
