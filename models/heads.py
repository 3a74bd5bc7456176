"""Scalar heads over hidden states.

B responses, T tokens, H hidden size. The reward head is the `score` layer of a Hugging Face sequence
classification model (models/reward.py); the critic's head is ours.
"""

import math

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """Linear critic head in float32. It starts at zero, so that first values are exactly 0 and the first
    advantages are the returns, not noise."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Values [B, T] in float32, whatever the type of `hidden_BTH` and under autocast too."""
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            values_BT: Tensor = self.linear(hidden_BTH.float())[..., 0].clone()  # FSDP warns of views
        return values_BT

    @torch.no_grad()
    def rescale_(self, *, old_mean: float, old_std: float, new_mean: float, new_std: float) -> None:
        """Keep std · output + mean what it was, for every input, when the statistics of its targets change.

        van Hasselt et al. 2016, "Learning values across many orders of magnitude" (PopArt), section 2.1,
        proposition 1. Parameters change in place, so the optimizer keeps them; its moments stay in old units.

        Args:
            old_mean, old_std: what outputs were denormalised with until now, in reward units.
            new_mean, new_std: what they will be denormalised with.

        Raises:
            ValueError: a number that is not finite, or a standard deviation that is not above 0.
        """
        for name, value, low in (
            ("old_mean", old_mean, -math.inf),
            ("old_std", old_std, 0.0),
            ("new_mean", new_mean, -math.inf),
            ("new_std", new_std, 0.0),
        ):
            if not low < value < math.inf:
                raise ValueError(f"{name} is {value}, allowed is a finite number{' above 0' if low == 0 else ''}")
        scale = old_std / new_std
        self.linear.weight.mul_(scale)
        self.linear.bias.mul_(scale).add_((old_mean - new_mean) / new_std)
