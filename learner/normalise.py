"""Running mean and variance, and the normalisation of rewards and value targets by them.

The state is three numbers that belong into the checkpoint (`RunningMoments.state`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_KEYS = ("count", "mean", "squared_deviations")


class RunningMoments:
    """Count, mean and (population) variance of all values seen, in float64.

    Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances":
    batches are merged, never forgotten, and their order or cut changes nothing but rounding. Ranks must all see
    the same values, those of the whole batch, or merge each other's moments.

    Args:
        std_floor: spread up to here is rounding, not signal, and is not divided by.
    """

    def __init__(self, *, std_floor: float = 1e-6) -> None:
        if not 0 <= std_floor < math.inf:
            raise ValueError(f"std_floor is {std_floor}, allowed is a finite number >= 0")
        self.std_floor = std_floor
        self.count = 0
        self.mean = 0.0
        self.squared_deviations = 0.0

    @property
    def variance(self) -> float:
        """Population variance; 0 before the first value."""
        return self.squared_deviations / max(self.count, 1)

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in the values of `x`, any shape, where the mask of the same shape is 1; none is no change.

        Raises:
            ValueError: shapes that disagree, values that are not finite or too large to square. Nothing has
                changed then.
        """
        if mask is not None and mask.shape != x.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, x {tuple(x.shape)}")
        values = (x.flatten() if mask is None else x[mask != 0]).double()
        if not values.isfinite().all():
            raise ValueError(f"x has {int((~values.isfinite()).sum())} values that are not finite")
        if values.numel():
            mean = values.mean()
            self._merge(values.numel(), mean.item(), (values - mean).square().sum().item())

    def merge(self, other: RunningMoments) -> None:
        """Take in all that `other` has seen."""
        if other.count:
            self._merge(other.count, other.mean, other.squared_deviations)

    def standardisation(self) -> tuple[float, float]:
        """(mean, std) to normalise with: (0, 1) until two values were seen, std 1 where there is no spread.

        Dividing by a floor instead would blow up equal scores that are not shifted, and PopArt's first targets.
        """
        if self.count < 2:
            return 0.0, 1.0
        std = math.sqrt(self.variance)
        # Merging leaves ~1e-16 of the mean in the deviations of equal values.
        no_spread = std <= max(self.std_floor, 1e-12 * abs(self.mean))
        return self.mean, 1.0 if no_spread else std

    def state(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in _KEYS}

    def restore(self, state: Mapping[str, float]) -> None:
        """Raises ValueError on missing or foreign keys and numbers out of range. Nothing has changed then."""
        if set(state) != set(_KEYS):
            raise ValueError(f"moments have keys {sorted(state)}, allowed are {', '.join(_KEYS)}")
        count, mean, squared_deviations = (float(state[name]) for name in _KEYS)
        if not (count >= 0 and count.is_integer()):
            raise ValueError(f"count is {count}, allowed is a whole number >= 0")
        if not math.isfinite(mean):
            raise ValueError(f"mean is {mean}, allowed is a finite number")
        if not 0 <= squared_deviations < math.inf:
            raise ValueError(f"squared_deviations is {squared_deviations}, allowed is a finite number >= 0")
        self.count, self.mean, self.squared_deviations = int(count), mean, squared_deviations

    def _merge(self, count: int, mean: float, squared_deviations: float) -> None:
        total = self.count + count
        gap = mean - self.mean
        merged_mean = self.mean + gap * (count / total)
        merged_deviations = self.squared_deviations + squared_deviations + gap * gap * (self.count * count / total)
        if not (math.isfinite(merged_mean) and math.isfinite(merged_deviations)):
            raise ValueError(f"values around {mean} are too large: their squares overflow float64")
        self.count, self.mean, self.squared_deviations = total, merged_mean, merged_deviations


@torch.no_grad()
def normalise(x: Tensor, moments: RunningMoments, *, clip: float = math.inf, shift: bool = True) -> Tensor:
    """(x - mean) / std within ±clip, of any shape; `x` itself until two values were seen.

    Without `shift`, x / std: what a reward's sign says, and which responses have none, stays. Update the moments
    with the batch first. NaN stays NaN. Engstrom et al. 2020, "Implementation Matters in Deep Policy Gradients",
    section 3 (reward scaling and clipping; by the spread of discounted returns there, of scores or returns here).

    Args:
        clip: in standard deviations; inf turns it off.

    Returns:
        float32, or float64 where x is, without gradient.

    Raises:
        ValueError: a clip that is not above 0.
    """
    if not clip > 0:
        raise ValueError(f"clip is {clip}, allowed is a number > 0")
    wide = torch.promote_types(x.dtype, torch.float32)
    if moments.count < 2:
        return x.to(wide)
    mean, std = moments.standardisation()
    centred = x.double() - mean if shift else x.double()  # float32 would cancel where the mean is large
    return (centred / std).clamp(-clip, clip).to(wide)


@torch.no_grad()
def denormalise(x: Tensor, moments: RunningMoments) -> Tensor:
    """std · x + mean: what `normalise` with shift and without clip had before. A critic's values in reward units."""
    mean, std = moments.standardisation()
    return (x.double() * std + mean).to(torch.promote_types(x.dtype, torch.float32))
