"""How surely a difference of scores predicts a vote: one temperature, fitted on prompts that nothing else saw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

LOWEST, HIGHEST = 0.05, 20.0  # a few rows without a contradiction would ask for 0
_HALVINGS = 60  # to the last bits of a float64


def fit_temperature(logits: Sequence[float], probabilities: Sequence[float]) -> float:
    """T that minimises the mean cross-entropy of sigmoid(logit / T) against `probabilities`, in [LOWEST, HIGHEST].

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2. The loss is convex in 1 / T, so its
    derivative, mean((sigmoid(d / T) - p) d), is bisected.

    Raises:
        ValueError: no rows, or a logit that is not finite.
    """
    d_N = torch.tensor(logits, dtype=torch.float64)
    p_N = torch.tensor(probabilities, dtype=torch.float64)
    if not len(d_N) or not torch.isfinite(d_N).all():
        raise ValueError(f"{len(d_N)} logits, {int((~torch.isfinite(d_N)).sum())} not finite: no temperature fits them")
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(_HALVINGS):
        inverse = (low + high) / 2
        if ((torch.sigmoid(inverse * d_N) - p_N) * d_N).mean() > 0:
            high = inverse
        else:
            low = inverse
    return 2 / (low + high)
