"""Which rows are trained on, which fit the temperature, and which are held out: by prompt, never by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from contracts.reward_model import RewardModelConfig
from contracts.seeds import derive_seed
from feedback.formats import split_by_prompt
from learner.reward_model.examples import Examples, Row, TokenLabel
from learner.reward_model.heads import Heads
from learner.reward_model.losses import balanced_class_weights

MIN_TRAIN_ROWS = 2
MIN_CALIBRATION_ROWS = 10  # a temperature of fewer would be noise: they are trained on instead


@dataclass(frozen=True)
class Split:
    """Rows by what they are for, no prompt in two of them."""

    train: list[Row]
    calibrate: list[Row]
    held_out: list[Row]


def split_rows(usable: Examples, config: RewardModelConfig, heads: Heads, *, seed: int) -> Split:
    """Hold prompts out, then set some of the others aside for the temperature, where they are enough.

    Raises:
        ValueError: too few rows are left, or none for a head.
    """
    rows = usable.rows
    several = len({row.prompt.strip() for row in rows}) > 1
    train, kept = split_by_prompt(rows, config.held_out_fraction, seed=seed) if several else (rows, [])
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(usable.dropped.items()) if count) or "none"
    if len(train) < MIN_TRAIN_ROWS or not kept:
        raise ValueError(
            f"{len(train)} usable comparisons and labels to train on and {len(kept)} held out (dropped: {dropped}): "
            f"needed are at least {MIN_TRAIN_ROWS} and 1, on different prompts"
        )
    for name in heads.names:
        if not of_head(train, heads, name):
            there = ", ".join(sorted({row.domain or "none" for row in rows}))
            raise ValueError(
                f"head {name}: no row to train on, of its domains {', '.join(heads.domains[name]) or 'all'}; "
                f"domains there are: {there} (dropped: {dropped})"
            )
    calibrate: list[Row] = []
    if config.calibration_fraction and len({row.prompt.strip() for row in train}) > 1:
        rest, calibrate = split_by_prompt(train, config.calibration_fraction, seed=derive_seed(seed, "calibration"))
        enough = all(len(of_head(calibrate, heads, name)) >= MIN_CALIBRATION_ROWS for name in heads.names)
        train, calibrate = (rest, calibrate) if enough else (train, [])
    return Split(train, calibrate, kept)


def of_head(rows: Sequence[Row], heads: Heads, name: str) -> list[Row]:
    return [row for row in rows if name in heads.of_domain(row.domain)]


def class_weights(usable: Examples, split: Split, config: RewardModelConfig, heads: Heads) -> tuple[float, float]:
    """Of bad and of good labels.

    Raises:
        ValueError: the labels that a head learns from are of one class.
    """
    for name in heads.names:
        learned = [
            example for example in usable.of(of_head(split.train, heads, name)) if isinstance(example, TokenLabel)
        ]
        if learned and len({label.probability for label in learned}) == 1:
            which = "good" if learned[0].probability else "bad"
            raise ValueError(f"head {name}: all {len(learned)} labels to train on are {which}: needed are both")
    labels = torch.tensor(
        [example.probability for example in usable.of(split.train) if isinstance(example, TokenLabel)]
    )
    return balanced_class_weights(labels) if len(labels) and config.class_weights == "balanced" else (1.0, 1.0)
