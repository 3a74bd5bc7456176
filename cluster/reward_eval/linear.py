"""Linear Bradley-Terry models: baselines that a reward model has to beat, and heads on features of a frozen base.

N pairs, D features. A model sees differences of features, chosen less rejected, and has no intercept: swapping the
sides turns the sign of its margin and nothing else.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import logsigmoid

from cluster.reward_eval.numbers import Array, log_losses

L2S = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)
NUM_FOLDS = 10
VOCABULARY = 2000
_WORD = re.compile(r"\w+|[^\w\s]")


def length_differences(lengths_N2: NDArray[np.int64]) -> Array:
    """[N, 1]: difference of log lengths, so that the only thing to learn is whether longer wins, and how surely."""
    logs_N2 = np.log1p(lengths_N2.astype(np.float64))
    return logs_N2[:, :1] - logs_N2[:, 1:]


def word_differences(chosen: Sequence[str], rejected: Sequence[str], *, vocabulary: int = VOCABULARY) -> Array:
    """[N, D]: difference of TF-IDF of words and pairs of words, each side of length 1.

    Terms are the `vocabulary` most frequent ones that at least two texts have; no label decides which.
    """
    texts = [_terms(text) for text in (*chosen, *rejected)]
    seen = Counter(term for terms in texts for term in set(terms))
    kept = [term for term, count in sorted(seen.items(), key=lambda each: (-each[1], each[0])) if count > 1]
    column = {term: at for at, term in enumerate(kept[:vocabulary])}
    counts = np.zeros((len(texts), max(1, len(column))), dtype=np.float32)
    for row, terms in zip(counts, texts, strict=True):
        for term, count in Counter(terms).items():
            if term in column:
                row[column[term]] = count
    weighted = np.log1p(counts) * np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0)))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)
    difference: Array = (weighted[: len(chosen)] - weighted[len(chosen) :]).astype(np.float64)
    return difference


def _terms(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return words + [f"{one} {two}" for one, two in itertools.pairwise(words)]


def fit_bradley_terry(differences_ND: Array, labels_N: Array, *, l2: float) -> Array:
    """The weights [D] that minimise Σ cross-entropy + l2 / 2 · |w|², by L-BFGS.

    Features are divided by their root mean square, which `l2` refers to; the weights are for the features as given.
    """
    scale_D = np.sqrt((differences_ND**2).mean(axis=0))
    scale_D[scale_D == 0] = 1.0
    x_ND = torch.from_numpy(differences_ND / scale_D)
    labels = torch.from_numpy(labels_N)
    weights_D = torch.zeros(x_ND.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_D], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        margins_N = x_ND @ weights_D
        fit = -(labels * logsigmoid(margins_N) + (1 - labels) * logsigmoid(-margins_N)).sum()
        total = (fit + l2 / 2 * weights_D.square().sum()) / len(labels)
        total.backward()
        return total

    optimizer.step(loss)
    fitted: Array = weights_D.detach().numpy() / scale_D
    return fitted


def fit_with_best_l2(
    differences_ND: Array, labels_N: Array, prompts_N: Sequence[str], *, l2s: Sequence[float] = L2S, seed: int
) -> Array:
    """The same with the `l2` that predicts a fifth of the prompts best, then fitted to all."""
    best = l2s[0]
    if len(l2s) > 1:
        asked_N = prompt_folds(prompts_N, 5, seed=seed) == 0
        known = differences_ND[~asked_N], labels_N[~asked_N]
        losses = [
            log_losses(differences_ND[asked_N] @ fit_bradley_terry(*known, l2=l2), labels_N[asked_N]).mean()
            for l2 in l2s
        ]
        best = l2s[int(np.argmin(losses))]
    return fit_bradley_terry(differences_ND, labels_N, l2=best)


def cross_fitted(
    differences_ND: Array,
    labels_N: Array,
    prompts_N: Sequence[str],
    *,
    l2s: Sequence[float] = L2S,
    num_folds: int = NUM_FOLDS,
    seed: int = 0,
) -> Array:
    """Margins [N], each from a fit to other prompts alone."""
    fold_N = prompt_folds(prompts_N, num_folds, seed=seed)
    margins_N = np.zeros(len(labels_N))
    for fold in np.unique(fold_N):
        here_N = fold_N == fold
        known_prompts = [prompt for prompt, here in zip(prompts_N, here_N, strict=True) if not here]
        if not known_prompts:
            continue
        weights_D = fit_with_best_l2(differences_ND[~here_N], labels_N[~here_N], known_prompts, l2s=l2s, seed=seed)
        margins_N[here_N] = differences_ND[here_N] @ weights_D
    return margins_N


def prompt_folds(prompts_N: Sequence[str], num_folds: int, *, seed: int) -> NDArray[np.intp]:
    """The fold [N] of each pair: whole prompts, as equal in number as can be."""
    names, group_N = np.unique(np.array(prompts_N, dtype=object).astype(str), return_inverse=True)
    fold_P = np.random.default_rng(seed).permutation(len(names)) % num_folds
    folds: NDArray[np.intp] = fold_P[group_N]
    return folds
