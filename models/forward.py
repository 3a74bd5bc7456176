"""What policy, reference and learner share of a forward pass: which rows predict, and which models can be computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.packing import Layout
from models.projection import score_tokens

# Settings by which some families change their logits after the projection; computing without them would be wrong.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def predicting_rows(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """bool [M]: the rows of a layout that predict a token, all but the one behind each response."""
    return torch.cat([torch.arange(length + 1) < length for length in lengths]).to(device)


@torch.no_grad()
def response_logprobs(model: Any, batch: Layout, tokens_N: Tensor, *, temperature: float) -> Tensor:
    """Log-probabilities [N] of the response tokens under a causal language model: float32, in nats."""
    device = tokens_N.device
    hidden_NH = batch.hidden(model.get_decoder(), device)[predicting_rows(batch.lengths, device)]
    output = model.get_output_embeddings()
    return score_tokens(hidden_NH, output.weight, output.bias, tokens_N, temperature=temperature)[0]


def check_supported(model: Any) -> None:
    """Refuse models whose logits are changed after the projection.

    Raises:
        ValueError: names the setting.
    """
    for name in _LOGIT_CHANGES:
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"model {model.config.name_or_path}: its config sets {name}, which is not supported")
