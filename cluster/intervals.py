"""Means with confidence intervals, so that no report calls noise a rise.

One value a prompt: where a prompt was sampled several times, average first. Responses to one prompt resemble
each other, and counted as independent they make every interval too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean of n values with its confidence interval. One value alone has an unbounded interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def direction(self) -> int:
        """1 or -1 where the whole interval lies above or below 0, else 0: the sign of `mean` is not established."""
        return int(self.low > 0) - int(self.high < 0)

    def record(self) -> dict[str, float | int | None]:
        """For JSON, which has no infinity: an unbounded end is null."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return {"mean": self.mean, "low": low, "high": high, "n": self.n}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Interval:
        """The inverse of `record`; KeyError or TypeError on anything else."""
        low, high = record["low"], record["high"]
        return cls(
            mean=float(record["mean"]),
            low=-math.inf if low is None else float(low),
            high=math.inf if high is None else float(high),
            n=int(record["n"]),
        )


def mean_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Mean of independent values and its Student t interval.

    Raises:
        ValueError: no values, a value that is not finite, more than one dimension, confidence outside (0, 1).
    """
    return _interval(_checked(values, "values"), confidence)


def paired_difference(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, *, confidence: float = 0.95
) -> Interval:
    """Mean of after - before, pair by pair: how hard a prompt is cancels out, so far fewer prompts are needed.

    Raises:
        ValueError: as for `mean_interval`, or the two differ in length.
    """
    first, second = _checked(before, "before"), _checked(after, "after")
    if first.size != second.size:
        raise ValueError(f"before has {first.size} values and after {second.size}: they must be the same prompts")
    return _interval(second - first, confidence)


def _checked(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} has {array.ndim} dimensions, one is allowed")
    if not array.size:
        raise ValueError(f"{name} is empty")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] is {array[bad[0]]}, only finite values are allowed")
    return array


def _interval(values: np.ndarray, confidence: float) -> Interval:
    mean = float(values.mean())
    if values.size == 1:
        t_quantile(1, confidence)  # refuses a bad confidence here too
        return Interval(mean, -math.inf, math.inf, 1)
    half = t_quantile(values.size - 1, confidence) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Interval(mean, mean - half, mean + half, int(values.size))


@lru_cache
def t_quantile(degrees: int, confidence: float) -> float:
    """The t with P(|T| <= t) = confidence for a whole number of degrees of freedom.

    Solves Abramowitz & Stegun 26.7.3 and 26.7.4 by bisection: with theta = arctan(t / sqrt(degrees)) that
    probability is a finite sum of powers of cos(theta). SciPy would be 35 MB for this one number.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    odd = degrees % 2
    # Coefficients 1, 1/2, (1·3)/(2·4), ... for even degrees and 1, 2/3, (2·4)/(3·5), ... for odd ones.
    k = np.arange(1, (degrees - odd) // 2)
    coefficients = np.cumprod(np.concatenate(([1.0], (2 * k - 1 + odd) / (2 * k + odd))))
    powers = 2 * np.arange(coefficients.size) + odd

    def probability(theta: float) -> float:
        if degrees == 1:
            return 2 * theta / math.pi
        series = math.sin(theta) * float(coefficients @ math.cos(theta) ** powers)
        return 2 / math.pi * (theta + series) if odd else series

    low, high = 0.0, math.pi / 2
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)
