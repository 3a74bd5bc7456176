"""Scalar heads over hidden states.

B responses, T tokens, H hidden size. The reward head is the `score` layer of a Hugging Face sequence
classification model (models/reward.py); the critic's head is ours.
"""

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
            values_BT: Tensor = self.linear(hidden_BTH.float()).squeeze(-1)
        return values_BT
