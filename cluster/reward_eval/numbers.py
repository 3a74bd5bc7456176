"""Accuracy, calibration and losses of pairwise predictions, with intervals over prompts.

N pairs, oriented as their file has them. `margins_N` are log odds that `chosen` is the better side, `labels_N` the
probability that it is, `prompts_N` names the prompt of a pair. Pairs on one prompt resemble each other: intervals
count prompts, not pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.intervals import Interval, t_quantile

Array = NDArray[np.float64]
NUM_BINS = 10
CHANCE_DRAWS = 200


@dataclass(frozen=True)
class Share:
    """A share of pairs with its 95 % interval over prompts."""

    value: float
    low: float
    high: float
    pairs: int
    prompts: int


@dataclass(frozen=True)
class Bin:
    """Pairs of like confidence: the mean of what was claimed, and how many labels agreed."""

    low: float
    high: float
    confidence: float
    agreement: Share


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error over bins. `by_chance` is its mean, `chance_limit` its 95 % quantile, for a model
    whose probabilities are exactly right: with few pairs no error is 0."""

    bins: tuple[Bin, ...]
    error: float
    by_chance: float
    chance_limit: float


@dataclass(frozen=True)
class Quality:
    """What margins are worth on some pairs. Losses in nats and squared probability; knowing nothing: 0.693 and 0.25."""

    accuracy: Share
    log_loss: Interval
    brier: Interval


def quality(margins_N: Array, labels_N: Array, prompts_N: Sequence[str]) -> Quality:
    return Quality(
        accuracy=accuracy(margins_N, labels_N, prompts_N),
        log_loss=mean_over_prompts(log_losses(margins_N, labels_N), prompts_N),
        brier=mean_over_prompts((sigmoid(margins_N) - labels_N) ** 2, prompts_N),
    )


def correct(margins_N: Array, labels_N: Array) -> Array:
    """1 where the sides are ranked as the majority ranks them, 0.5 for equal scores, NaN where votes were split."""
    ranked_N = np.where(margins_N == 0, 0.5, ((margins_N > 0) == (labels_N > 0.5)).astype(float))
    return np.where(labels_N == 0.5, np.nan, ranked_N)


def accuracy(margins_N: Array, labels_N: Array, prompts_N: Sequence[str]) -> Share:
    """Share of decided pairs that are ranked right."""
    correct_N = correct(margins_N, labels_N)
    decided_N = ~np.isnan(correct_N)
    return share(correct_N[decided_N], _only(prompts_N, decided_N))


def share(values_N: Array, prompts_N: Sequence[str]) -> Share:
    """Mean of values in [0, 1] with a Wilson (1927) interval for the effective number of pairs.

    That number is the one at which independent pairs would have the variance that the prompts show (Kish 1965), at
    most the number of pairs; where all values agree nothing is shown, and it is that of the prompts. Student's t over
    prompts replaces the normal quantile (Dean & Pagano 2015, who found this form to keep its level in clusters). A
    bootstrap over prompts would give an interval of width 0 where every pair is right.
    """
    if not len(values_N):
        return Share(0.5, 0.0, 1.0, 0, 0)
    mean, variance, num_prompts = _clustered(values_N, prompts_N)
    if num_prompts < 2:
        return Share(mean, 0.0, 1.0, len(values_N), num_prompts)
    size = min(len(values_N), mean * (1 - mean) / variance) if variance > 0 else num_prompts
    z2 = t_quantile(num_prompts - 1, 0.95) ** 2
    center = (mean + z2 / (2 * size)) / (1 + z2 / size)
    half = math.sqrt(z2 * (mean * (1 - mean) / size + z2 / (4 * size * size))) / (1 + z2 / size)
    return Share(mean, max(0.0, center - half), min(1.0, center + half), len(values_N), num_prompts)


def mean_over_prompts(values_N: Array, prompts_N: Sequence[str]) -> Interval:
    """Mean over pairs, its 95 % Student interval over prompts (variance of a ratio, Cochran 1977, section 9A.6)."""
    if not len(values_N):
        return Interval(math.nan, -math.inf, math.inf, 0)
    mean, variance, num_prompts = _clustered(values_N, prompts_N)
    if num_prompts < 2:
        return Interval(mean, -math.inf, math.inf, num_prompts)
    half = t_quantile(num_prompts - 1, 0.95) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, num_prompts)


def better_by(margins_N: Array, than_N: Array, labels_N: Array, prompts_N: Sequence[str]) -> Interval:
    """Accuracy of `margins_N` less that of `than_N` on the same pairs."""
    gain_N = correct(margins_N, labels_N) - correct(than_N, labels_N)
    decided_N = ~np.isnan(gain_N)
    return mean_over_prompts(gain_N[decided_N], _only(prompts_N, decided_N))


def log_losses(margins_N: Array, labels_N: Array) -> Array:
    """Cross-entropy of each pair, in nats."""
    return labels_N * np.logaddexp(0, -margins_N) + (1 - labels_N) * np.logaddexp(0, margins_N)


def calibration(
    margins_N: Array, labels_N: Array, prompts_N: Sequence[str], *, equal_mass: bool, num_bins: int = NUM_BINS
) -> Calibration:
    """Claimed against found, for the side that the model prefers: a confidence lies in [0.5, 1].

    Bins of equal width (Naeini et al. 2015) or, adaptive, of equal numbers of pairs (Nguyen & O'Connor 2015). The
    error is the mean over pairs of |confidence - agreement| of their bin.
    """
    confidence_N = sigmoid(np.abs(margins_N))
    agreement_N = np.where(margins_N == 0, 0.5, np.where(margins_N > 0, labels_N, 1 - labels_N))
    if equal_mass:
        edges = np.quantile(confidence_N, np.linspace(0, 1, num_bins + 1)) if len(margins_N) else np.array([0.5, 1.0])
        edges = np.unique(edges)
    else:
        edges = np.linspace(0.5, 1.0, num_bins + 1)
    bin_N = np.clip(np.searchsorted(edges, confidence_N, side="right") - 1, 0, max(0, len(edges) - 2))
    bins = [
        Bin(
            low=float(edges[b]),
            high=float(edges[min(b + 1, len(edges) - 1)]),
            confidence=float(confidence_N[bin_N == b].mean()),
            agreement=share(agreement_N[bin_N == b], _only(prompts_N, bin_N == b)),
        )
        for b in np.unique(bin_N)
    ]
    rng = np.random.default_rng(0)
    draws = [
        _calibration_error(confidence_N, (rng.random(len(margins_N)) < confidence_N).astype(float), bin_N)
        for _ in range(CHANCE_DRAWS if len(margins_N) else 0)
    ]
    return Calibration(
        bins=tuple(bins),
        error=_calibration_error(confidence_N, agreement_N, bin_N),
        by_chance=float(np.mean(draws)) if draws else 0.0,
        chance_limit=float(np.quantile(draws, 0.95)) if draws else 0.0,
    )


def _calibration_error(confidence_N: Array, agreement_N: Array, bin_N: NDArray[np.intp]) -> float:
    gaps = np.bincount(bin_N, weights=confidence_N - agreement_N)
    return float(np.abs(gaps).sum() / max(1, len(bin_N)))


def by_domain(
    margins_N: Array, labels_N: Array, prompts_N: Sequence[str], domains_N: Sequence[str]
) -> dict[str, Quality]:
    """The quality within each domain, the largest domain first."""
    names, counts = np.unique(np.array(domains_N, dtype=object).astype(str), return_counts=True)
    found = {}
    for name in names[np.argsort(-counts, kind="stable")]:
        here_N = np.array([domain == name for domain in domains_N])
        found[str(name)] = quality(margins_N[here_N], labels_N[here_N], _only(prompts_N, here_N))
    return found


def by_length(
    margins_N: Array, labels_N: Array, prompts_N: Sequence[str], lengths_N2: NDArray[np.int64], *, within: float = 0.1
) -> dict[str, Share]:
    """Accuracy where length cannot help, and where it points to the right or the wrong side.

    `matched`: the lengths differ by at most `within` of the longer. `longer` and `shorter`: the better side is so.
    """
    longest_N = np.maximum(lengths_N2.max(axis=1), 1)
    better_N = np.where(labels_N > 0.5, lengths_N2[:, 0], lengths_N2[:, 1])
    worse_N = np.where(labels_N > 0.5, lengths_N2[:, 1], lengths_N2[:, 0])
    strata = {
        "matched": np.abs(lengths_N2[:, 0] - lengths_N2[:, 1]) <= within * longest_N,
        "longer": better_N > worse_N,
        "shorter": better_N < worse_N,
    }
    return {name: accuracy(margins_N[in_N], labels_N[in_N], _only(prompts_N, in_N)) for name, in_N in strata.items()}


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def _clustered(values_N: Array, prompts_N: Sequence[str]) -> tuple[float, float, int]:
    """(mean over pairs, variance of that mean when prompts are drawn, number of prompts); 0 for one prompt alone."""
    names, group_N = np.unique(np.array(prompts_N, dtype=object).astype(str), return_inverse=True)
    mean = float(values_N.mean())
    if len(names) < 2:
        return mean, 0.0, len(names)
    sums_P = np.bincount(group_N, weights=values_N - mean)
    variance = len(names) / (len(names) - 1) * float(sums_P @ sums_P) / len(values_N) ** 2
    return mean, variance, len(names)


def _only(prompts_N: Sequence[str], kept_N: NDArray[np.bool_]) -> list[str]:
    return [prompt for prompt, kept in zip(prompts_N, kept_N, strict=True) if kept]
