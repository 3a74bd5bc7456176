"""Sequences for one forward pass: laid end to end, or padded side by side.

B responses, N rows of the forward pass, L padded tokens of a sequence, H hidden, D head size.
M = Σ(T_b + 1): for each response in turn, the rows that predict its T_b tokens and the row behind its last token.

Packed, a prompt that several responses share can stand there once: its responses continue at the same positions and
attend to it and to themselves, not to each other. Padded is the plain way, kept for models whose attention cannot be
replaced, and as the other side of the equivalence tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from models.packed_attention import PACKED_ATTENTION, Segment, Segments


class Layout(Protocol):
    """A batch of responses, ready for the trunk of a causal language model."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Response tokens of each sequence."""
        ...

    def hidden(self, trunk: Any, device: torch.device) -> Tensor:
        """Last hidden states [M, H] of a decoder without its output projection."""
        ...


@dataclass(frozen=True)
class Packed:
    """All sequences end to end in one row; `predict_M` are the rows of M among the N."""

    lengths: tuple[int, ...]
    input_N: Tensor
    positions_N: Tensor
    predict_M: Tensor
    segments: Segments

    def hidden(self, trunk: Any, device: torch.device) -> Tensor:
        hidden_1NH = trunk(
            input_ids=self.input_N[None].to(device),
            position_ids=self.positions_N[None].to(device),
            use_cache=False,
            segments=self.segments,
        ).last_hidden_state
        return hidden_1NH[0].index_select(0, self.predict_M.to(device))


@dataclass(frozen=True)
class Padded:
    """One sequence a row, padded on the right to the longest; `rows_M` and `columns_M` locate M in [B, L]."""

    lengths: tuple[int, ...]
    input_BL: Tensor
    attention_BL: Tensor
    rows_M: Tensor
    columns_M: Tensor

    def hidden(self, trunk: Any, device: torch.device) -> Tensor:
        hidden_BLH = trunk(
            input_ids=self.input_BL.to(device), attention_mask=self.attention_BL.to(device), use_cache=False
        ).last_hidden_state
        return hidden_BLH[self.rows_M.to(device), self.columns_M.to(device)]


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, share_prompts: bool) -> Packed:
    """Lay prompts and responses end to end; with `share_prompts` each distinct prompt stands there once.

    Raises:
        ValueError: a prompt or a response is empty.
    """
    _refuse_empty(prompts, responses)
    groups: dict[object, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt) if share_prompts else row, []).append(row)
    tokens: list[int] = []
    positions: list[int] = []
    predict: list[list[int]] = [[] for _ in responses]
    segments: list[Segment] = []
    for rows in groups.values():
        prompt = prompts[rows[0]]
        start, end = len(tokens), len(tokens) + len(prompt)
        tokens += prompt
        positions += range(len(prompt))
        if len(rows) > 1:
            segments.append(Segment(start, end, start, start))
        for row in rows:
            begin = len(tokens)
            tokens += responses[row]
            positions += range(len(prompt), len(prompt) + len(responses[row]))
            alone = len(rows) == 1
            segments.append(Segment(start if alone else begin, len(tokens), start, start if alone else end))
            # Row i predicts token i + 1; the first token is predicted by the prompt's last row.
            predict[row] = [end - 1, *range(begin, len(tokens))]
    return Packed(
        lengths=tuple(map(len, responses)),
        input_N=torch.tensor(tokens),
        positions_N=torch.tensor(positions),
        predict_M=torch.tensor([index for indices in predict for index in indices]),
        segments=Segments(tuple(segments)),
    )


def pad(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Padded:
    """Pad to the longest sequence; what the padding holds does not matter, the attention mask decides.

    Raises:
        ValueError: a prompt or a response is empty.
    """
    _refuse_empty(prompts, responses)
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    input_BL = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    attention_BL = torch.zeros_like(input_BL)
    for row, tokens in enumerate(sequences):
        input_BL[row, : len(tokens)] = torch.tensor(tokens)
        attention_BL[row, : len(tokens)] = 1
    columns = [torch.arange(len(p) - 1, len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]
    return Padded(
        lengths=tuple(map(len, responses)),
        input_BL=input_BL,
        attention_BL=attention_BL,
        rows_M=torch.repeat_interleave(torch.arange(len(columns)), torch.tensor([len(part) for part in columns])),
        columns_M=torch.cat(columns),
    )


def packed_tokens(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, share_prompts: bool) -> int:
    """N of `pack`."""
    kept = {tuple(prompt) for prompt in prompts} if share_prompts else prompts
    return sum(map(len, kept)) + sum(map(len, responses))


def allow_packing(model: Any) -> None:
    """Make a model from transformers attend within segments.

    Raises:
        ValueError: its attention cannot be replaced; train it with `padded`.
    """
    reason = why_not_packed(model)
    if reason is not None:
        raise ValueError(f"model {model.config.name_or_path}: {reason}; set training.packing to padded")
    model.set_attn_implementation(PACKED_ATTENTION)


def why_not_packed(model: Any) -> str | None:
    """What of a model packing does not know; None if it can be packed."""
    if not model._supports_attention_backend:
        return f"{type(model).__name__} brings its own attention and cannot be packed"
    if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        return "its config sets sliding_window, which packing does not know"
    return None


def _refuse_empty(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
    if not responses or not all(map(len, prompts)) or not all(map(len, responses)):
        raise ValueError("every sequence needs at least one prompt token and one response token")
