"""Votes of a real crowd: how well each method foretells those that it has not seen, and what the panel is like."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.feedback.intervals import Array, interval, sigmoid
from feedback.annotators import krippendorff_alpha, side_bias
from feedback.ballots import TIE, A, B, Ballots
from feedback.crowd_bt import CrowdBradleyTerry, crowd_bradley_terry
from feedback.quality import dawid_skene, predicted_choices


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


def crowd_votes(data: Path) -> tuple[Ballots, list[dict[str, str]]]:
    path = data / "crowd_votes.jsonl.gz"
    if not path.exists():
        raise SystemExit(f"{path} is missing: give --data the folder with the crowd votes")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    names = {"left": "a", "right": "b", "tie": "tie"}
    columns = ([row["id"] for row in rows], [row["worker"] for row in rows], [names[row["winner"]] for row in rows])
    return Ballots.from_columns(*columns, left=["a"] * len(rows)), rows
