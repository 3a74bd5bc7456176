"""From token lists to hidden states at the positions that predict the response: learner and reference share it.

B responses, T response tokens, U = T + 1, L prompt and response tokens of a sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Settings by which some families change their logits after the projection; computing without them would be wrong.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@dataclass(frozen=True)
class ResponseBatch:
    """Right-padded sequences for one forward pass.

    `positions_BU`: column t is the position that predicts response token t; the column after a row's last token is
    the state behind it, and padding columns repeat that. `lengths_B` counts response tokens.
    """

    input_BL: Tensor
    attention_BL: Tensor
    positions_BU: Tensor
    tokens_BT: Tensor
    lengths_B: Tensor

    def to(self, device: torch.device) -> ResponseBatch:
        return ResponseBatch(*(tensor.to(device) for tensor in vars(self).values()))


def pad_responses(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], *, pad_token: int
) -> ResponseBatch:
    """Pad prompt + response token lists; what `pad_token` is does not matter, the attention mask decides.

    Raises:
        ValueError: a prompt or a response is empty.
    """
    if any(not 0 < start < len(tokens) for tokens, start in zip(sequences, prompt_lengths, strict=True)):
        raise ValueError("every sequence needs at least one prompt token and one response token")
    starts_B = torch.tensor(prompt_lengths)
    ends_B = torch.tensor([len(tokens) for tokens in sequences])
    lengths_B = ends_B - starts_B
    width = int(lengths_B.max())
    input_BL = torch.full((len(sequences), int(ends_B.max())), pad_token)
    attention_BL = torch.zeros_like(input_BL)
    tokens_BT = torch.full((len(sequences), width), pad_token)
    for row, (tokens, start) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        input_BL[row, : len(tokens)] = torch.tensor(tokens)
        attention_BL[row, : len(tokens)] = 1
        tokens_BT[row, : len(tokens) - start] = torch.tensor(tokens[start:])
    # The logits at position i predict token i + 1.
    positions_BU = (starts_B[:, None] - 1 + torch.arange(width + 1)).minimum(ends_B[:, None] - 1)
    return ResponseBatch(input_BL, attention_BL, positions_BU, tokens_BT, lengths_B)


def response_hidden(model: Any, batch: ResponseBatch) -> Tensor:
    """Hidden states [B, U, H] of a causal language model at `positions_BU`, before the output projection."""
    trunk = model.get_decoder()
    hidden_BLH = trunk(input_ids=batch.input_BL, attention_mask=batch.attention_BL).last_hidden_state
    return hidden_BLH.gather(1, batch.positions_BU[..., None].expand(-1, -1, hidden_BLH.shape[-1]))


def response_logits(model: Any, hidden_BUH: Tensor) -> Tensor:
    """Logits [B, T, V] for the response tokens alone: prompts are never projected to the vocabulary."""
    logits_BTV: Tensor = model.get_output_embeddings()(hidden_BUH[:, :-1])
    return logits_BTV


def check_supported(model: Any) -> None:
    """Refuse models whose logits are changed after the projection.

    Raises:
        ValueError: names the setting.
    """
    for name in _LOGIT_CHANGES:
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"model {model.config.name_or_path}: its config sets {name}, which is not supported")
