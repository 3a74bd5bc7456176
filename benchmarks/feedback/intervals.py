"""Means of independent repetitions with their intervals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def interval(values: Array, form: str) -> str:
    """Mean and 95 % interval of independent repetitions (Student's t, 1.96 beyond 30)."""
    t = {10: 2.262, 20: 2.093}.get(len(values), 1.96 + 3 / len(values))
    half = t * values.std(ddof=1) / np.sqrt(len(values))
    if np.isnan(half):
        return "-"
    return f"{values.mean():{form}} ({values.mean() - half:{form}} to {values.mean() + half:{form}})"


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))
