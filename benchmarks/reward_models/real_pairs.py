"""The real pairs with their frozen features, and splits of them by prompt."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.reward_eval.features import frozen_features
from cluster.reward_eval.linear import prompt_folds
from cluster.reward_eval.numbers import Array
from contracts.records import Comparison
from feedback.formats import read_preferences


@dataclass(frozen=True)
class RealPairs:
    """N pairs of which `chosen` is the better one. `features_NH`: chosen less rejected, each feature of variance 1."""

    rows: list[Comparison]
    features_NH: Array
    prompts_N: list[str]


def real_pairs(arguments: argparse.Namespace) -> RealPairs:
    """The first `--pairs` of the harmless pairs; skips with a reason where they are absent."""
    path = arguments.data / "hh_harmless_pairs.jsonl.gz"
    if not path.exists():
        raise SystemExit(f"skipped: {path} is missing: give --data the folder with the harmless pairs")
    rows = read_preferences(path)[0][: arguments.pairs]
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{line}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    usable, features_N2H, dropped = frozen_features(
        rows, base=arguments.base, max_tokens=arguments.max_tokens, cache=arguments.cache, say=say
    )
    difference_NH = (features_N2H[:, 0] - features_N2H[:, 1]).astype(np.float64)
    prompts = [row.prompt.strip() for row in usable]
    left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "none"
    print(f"{len(usable)} pairs on {len(set(prompts))} prompts (left out: {left_out}), ", end="")
    print(f"{difference_NH.shape[1]} features of {arguments.base}, at most {arguments.max_tokens} tokens, ", end="")
    print(f"{arguments.seeds} seeds\n", flush=True)
    scale_H = np.sqrt((difference_NH**2).mean(axis=0))
    return RealPairs(usable, difference_NH / np.where(scale_H == 0, 1, scale_H), prompts)


def split(prompts_N: list[str], seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pairs are for training, for choosing and for testing: 60, 20 and 20 % of the prompts."""
    fold_N = prompt_folds(prompts_N, 5, seed=seed)
    return fold_N >= 2, fold_N == 1, fold_N == 0


def only(prompts_N: list[str], kept_N: NDArray[np.bool_]) -> list[str]:
    return [prompt for prompt, kept in zip(prompts_N, kept_N, strict=True) if kept]
