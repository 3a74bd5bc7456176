"""Where gold turns down while a policy climbs its proxy, and how sure that is: pure numbers of runs that are done.

S steps, B responses of a step, R bootstrap replicates, N runs of one rule (seeds). Curves are smoothed over steps with
a Gaussian kernel, KL and gold alike. Replicates draw the responses of each step anew, with replacement (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BANDWIDTH_STEPS = 1.5
REPLICATES = 1000
LEVEL = 0.05


@dataclass(frozen=True)
class Climb:
    """A run: one number a response, by step. `alarms` are the steps in which each alarm was first raised."""

    rule: str
    seed: int
    kl_SB: list[Array]
    proxy_SB: list[Array]
    gold_SB: list[Array]
    held_out_SB: list[Array]
    alarms: Mapping[str, int]

    @property
    def num_steps(self) -> int:
        return len(self.kl_SB)

    @property
    def kl_S(self) -> Array:
        """Smoothed KL of each step."""
        return smoothing(self.num_steps) @ means(self.kl_SB)


@dataclass(frozen=True)
class Turn:
    """Where smoothed gold is highest, with 95 % intervals, and whether it fell from there by more than chance gives.

    `p`: chance of as great a fall to the last step if gold had never fallen. Steps count from 1.
    """

    step: int
    steps: tuple[int, int]
    kl: float
    kls: tuple[float, float]
    gold: float
    gold_at_end: float
    p: float

    @property
    def turned(self) -> bool:
        return self.p < LEVEL


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def turn_of(climb: Climb, rng: np.random.Generator, *, replicates: int = REPLICATES) -> Turn:
    """The peak of smoothed gold.

    Whatever the noise, some step has the highest gold, so the fall from it is never negative. It is held against falls
    of gold that is the same in all steps, with the responses' own spread: no gold that never falls has greater ones,
    for what it gains between the peak and the end only makes the fall smaller.
    """
    weights_SS = smoothing(climb.num_steps)
    gold_S = weights_SS @ means(climb.gold_SB)
    peak = int(gold_S.argmax())
    # A bootstrap's means spread by (B - 1) / B too little.
    flat_SB = [(gold_B - gold_B.mean()) * np.sqrt(len(gold_B) / max(len(gold_B) - 1, 1)) for gold_B in climb.gold_SB]
    flat_RS = resampled([flat_SB], rng, replicates)[0] @ weights_SS.T
    falls_R = flat_RS.max(axis=1) - flat_RS[:, -1]
    p = (1 + int((falls_R >= gold_S[peak] - gold_S[-1]).sum())) / (1 + replicates)
    kl_RS, gold_RS = (each @ weights_SS.T for each in resampled([climb.kl_SB, climb.gold_SB], rng, replicates))
    peaks_R = gold_RS.argmax(axis=1)
    kls = np.quantile(kl_RS[np.arange(replicates), peaks_R], (0.025, 0.975))
    steps = np.quantile(peaks_R + 1, (0.025, 0.975), method="nearest")
    return Turn(
        step=peak + 1,
        steps=(int(steps[0]), int(steps[1])),
        kl=float(climb.kl_S[peak]),
        kls=(float(kls[0]), float(kls[1])),
        gold=float(gold_S[peak]),
        gold_at_end=float(gold_S[-1]),
        p=p,
    )


def gold_gain(
    base: Sequence[Climb], other: Sequence[Climb], *, kl: float, rng: np.random.Generator, replicates: int = REPLICATES
) -> Estimate:
    """Gold of `other` less that of `base` where each first reaches this KL, over pairs of runs of equal seed.

    Raises:
        ValueError: the seeds are not the same, or none.
    """
    if not base or [climb.seed for climb in base] != [climb.seed for climb in other]:
        raise ValueError("compares runs of the same seeds, one at least")
    gains_N = np.array([gold_at(b, kl) - gold_at(a, kl) for a, b in zip(base, other, strict=True)])
    gains_NR = np.stack(
        [
            _gold_at_resampled(b, kl, rng, replicates) - _gold_at_resampled(a, kl, rng, replicates)
            for a, b in zip(base, other, strict=True)
        ]
    )
    return estimate(gains_N, gains_NR, rng)


def gold_at(climb: Climb, kl: float) -> float:
    """Smoothed gold where smoothed KL first reaches `kl`, straight between steps."""
    return _crossing(climb.kl_S, smoothing(climb.num_steps) @ means(climb.gold_SB), kl)


def reached(climbs: Sequence[Climb]) -> float:
    """The greatest KL that every run has reached."""
    return min(float(climb.kl_S.max()) for climb in climbs)


def _gold_at_resampled(climb: Climb, kl: float, rng: np.random.Generator, replicates: int) -> Array:
    weights_SS = smoothing(climb.num_steps)
    kl_RS, gold_RS = (each @ weights_SS.T for each in resampled([climb.kl_SB, climb.gold_SB], rng, replicates))
    return np.array([_crossing(kl_S, gold_S, kl) for kl_S, gold_S in zip(kl_RS, gold_RS, strict=True)])


def _crossing(kl_S: Array, gold_S: Array, kl: float) -> float:
    after = int((kl_S >= kl).argmax()) if (kl_S >= kl).any() else len(kl_S) - 1
    if after == 0 or kl_S[after] <= kl:
        return float(gold_S[after])
    share = (kl - kl_S[after - 1]) / (kl_S[after] - kl_S[after - 1])
    return float((1 - share) * gold_S[after - 1] + share * gold_S[after])


@dataclass(frozen=True)
class Bin:
    """Means over the steps of one rule whose smoothed KL lies in a range of KL."""

    num_steps: int
    kl: float
    proxy: float
    gold: Estimate
    held_out: float


def binned(
    climbs: Sequence[Climb], edges: Array, rng: np.random.Generator, *, replicates: int = REPLICATES
) -> list[Bin | None]:
    """A rule's runs by KL, None for a range in which they have no step. The outermost ranges have no end."""
    inner = edges[1:-1]
    places = [np.digitize(climb.kl_S, inner) for climb in climbs]
    return [
        _bin([(climb, np.flatnonzero(at == place)) for climb, at in zip(climbs, places, strict=True)], rng, replicates)
        for place in range(len(inner) + 1)
    ]


def _bin(parts: Sequence[tuple[Climb, NDArray[np.int64]]], rng: np.random.Generator, replicates: int) -> Bin | None:
    parts = [(climb, steps) for climb, steps in parts if len(steps)]
    if not parts:
        return None

    def of(name: str) -> Array:
        return np.array([np.mean([getattr(climb, name)[step].mean() for step in steps]) for climb, steps in parts])

    gold_NR = np.stack(
        [
            resampled([[climb.gold_SB[step] for step in steps]], rng, replicates)[0].mean(axis=1)
            for climb, steps in parts
        ]
    )
    return Bin(
        num_steps=sum(len(steps) for _, steps in parts),
        kl=float(of("kl_SB").mean()),
        proxy=float(of("proxy_SB").mean()),
        gold=estimate(of("gold_SB"), gold_NR, rng),
        held_out=float(of("held_out_SB").mean()),
    )


def bin_edges(climbs: Sequence[Climb], num_bins: int) -> Array:
    """Of KL, with as many steps of all runs together in each range."""
    edges: Array = np.quantile(np.concatenate([climb.kl_S for climb in climbs]), np.linspace(0, 1, num_bins + 1))
    return edges


def estimate(values_N: Array, replicates_NR: Array, rng: np.random.Generator) -> Estimate:
    """Mean over runs; the interval draws runs anew, and of each a replicate. One run stands for no others."""
    runs, replicates = replicates_NR.shape
    chosen_NR = rng.integers(runs, size=(runs, replicates))
    picked_NR = rng.integers(replicates, size=(runs, replicates))
    low, high = np.quantile(replicates_NR[chosen_NR, picked_NR].mean(axis=0), (0.025, 0.975))
    return Estimate(float(values_N.mean()), float(low), float(high))


def smoothing(num_steps: int, *, bandwidth_steps: float = BANDWIDTH_STEPS) -> Array:
    """[S, S]: rows of a Gaussian kernel that sum to 1 (Nadaraya 1964; Watson 1964)."""
    steps = np.arange(num_steps)
    weights_SS = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / bandwidth_steps) ** 2)
    rows: Array = weights_SS / weights_SS.sum(axis=1, keepdims=True)
    return rows


def means(values_SB: Sequence[Array]) -> Array:
    return np.array([values_B.mean() for values_B in values_SB])


def resampled(columns: Sequence[Sequence[Array]], rng: np.random.Generator, replicates: int) -> list[Array]:
    """[R, S] for each column: means of steps whose responses are drawn anew, the same ones in every column."""
    found = [np.empty((replicates, len(columns[0]))) for _ in columns]
    for step, first_B in enumerate(columns[0]):
        drawn_RB = rng.integers(len(first_B), size=(replicates, len(first_B)))
        for at, column in enumerate(columns):
            found[at][:, step] = column[step][drawn_RB].mean(axis=1)
    return found
