"""What tells two texts apart, in numbers, without a model and without labels."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def text_differences(
    texts_a: Sequence[str], texts_b: Sequence[str], *, width: int = 4096, dimensions: int = 32
) -> NDArray[np.float64]:
    """(P, D): TF-IDF of words and pairs of words, a less b, on the D leading singular vectors; deviation 1 over all.

    Words are hashed into `width` columns. D is `dimensions`, or less where there are fewer pairs. The singular vectors
    are those of Halko, Martinsson & Tropp 2011, "Finding Structure with Randomness", algorithm 4.4, with a fixed seed.
    """
    counts = np.zeros((len(texts_a) + len(texts_b), width), dtype=np.float32)
    for row, text in zip(counts, [*texts_a, *texts_b], strict=True):
        words = text.lower().split()
        for term in words + [f"{one} {two}" for one, two in pairwise(words)]:
            row[zlib.crc32(term.encode()) % width] += 1
    weighted = np.log1p(counts) * (np.log((1 + len(counts)) / (1 + (counts > 0).sum(axis=0))) + 1)
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)
    difference = weighted[: len(texts_a)] - weighted[len(texts_a) :]
    basis = difference.T @ np.random.default_rng(0).normal(size=(len(difference), dimensions + 20))
    for _ in range(3):
        basis = difference.T @ (difference @ np.linalg.qr(basis)[0])
    left, values, _ = np.linalg.svd(difference @ np.linalg.qr(basis)[0], full_matrices=False)
    features = (left * values)[:, :dimensions]
    return np.asarray(features / max(features.std(), 1e-9), dtype=np.float64)
