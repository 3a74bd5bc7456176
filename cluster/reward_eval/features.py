"""Features of a frozen base: what heads are trained on many times for the price of one pass.

N pairs, H hidden size. The feature of a dialogue is the last hidden state at its last token.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from contracts.records import Comparison
from learner.reward_model.batches import pair_scores
from learner.reward_model.examples import TokenPair, token_pairs
from learner.reward_model.network import initial_model
from models.bundled import resolve
from models.reward import load_tokenizer

MICRO_BATCH_TOKENS = 4096

Features = NDArray[np.float32]


def frozen_features(
    comparisons: Sequence[Comparison],
    *,
    base: str,
    max_tokens: int,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Comparison], Features, dict[str, int]]:
    """The usable comparisons, their features [N, 2, H] (chosen, rejected), and how many were dropped by reason.

    bf16 weights and arithmetic, whole prompts shared by both sides. In `cache`, a folder, they are kept under a name
    that says what they were computed from.

    Raises:
        ValueError: `base` does not load, or has no tokenizer or chat template.
    """
    path = resolve(base)
    tokenizer = load_tokenizer(path, name=base)
    dropped: Counter[str] = Counter()
    usable, rows = token_pairs(comparisons, tokenizer, max_tokens, dropped)
    kept = cache / f"features-{_key(base, rows)}.npy" if cache else None
    if kept is not None and kept.exists():
        return usable, np.load(kept, allow_pickle=False), dict(dropped)
    model = initial_model(path, name=base, seed=0).bfloat16()
    hidden_size = model.config.hidden_size
    model.score = nn.Identity()  # the head's input instead of its output
    features_N2H = np.zeros((len(rows), 2, hidden_size), dtype=np.float32)
    done = 0
    for batch in _batches(rows):
        with torch.inference_mode():
            sides = pair_scores(model, [rows[row] for row in batch])
        for side, hidden_BH in enumerate(sides):
            features_N2H[batch, side] = hidden_BH.float().numpy()
        done += len(batch)
        say(f"features of a frozen {base}: {done} of {len(rows)} pairs")
    if kept is not None:
        _keep(kept, features_N2H)
    return usable, features_N2H, dict(dropped)


def _batches(rows: Sequence[TokenPair]) -> list[list[int]]:
    """Rows of like length in batches of at most MICRO_BATCH_TOKENS padded tokens."""
    lengths = [len(row.chosen) + len(row.rejected) - row.shared_tokens for row in rows]
    batches: list[list[int]] = []
    for row in sorted(range(len(rows)), key=lambda row: lengths[row]):
        if batches and lengths[row] * (len(batches[-1]) + 1) <= MICRO_BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _key(base: str, rows: Sequence[TokenPair]) -> str:
    digest = hashlib.sha256(base.encode())
    for row in rows:
        digest.update(np.array([len(row.chosen), *row.chosen, *row.rejected]).tobytes())
    return digest.hexdigest()[:16]


def _keep(path: Path, features: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, features)
    os.replace(partial, path)
