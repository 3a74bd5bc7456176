"""Attention within the segments of a packed row, registered with transformers under PACKED_ATTENTION.

N rows, S rows of a block, A heads, K key heads, D head size. A segment's rows attend causally to each other and wholly
to its prefix (a shared prompt). On CPU a short tree (a prompt and its responses) is attended whole under one small
mask, with plain matrix products: in bf16 their backward pass takes a fifth of the time of the flash kernel's. Longer
ones go segment by segment through the flash kernel, whose memory does not grow with the square. A dense mask over
all N rows would double the work of a forward pass. On GPU it is one variable-length kernel
(torch.nn.attention.varlen), keys of shared prompts gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED_ATTENTION = "headrace_packed"
# Up to so many rows a block keeps its S·S probabilities for the backward pass.
_SHORT_ROWS = 256


class Segment(NamedTuple):
    """Rows start to end, after the prefix rows prefix_start to prefix_end (none where those are equal)."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass(frozen=True)
class Block:
    """Rows under one call on CPU: `bias_SS` (0 or -inf) where it is short, else one segment for the flash kernel."""

    start: int
    end: int
    bias_SS: Tensor | None
    segment: Segment


@dataclass(frozen=True)
class Segments:
    """Who attends to whom in a packed row. Segments cover the rows in order, without gaps."""

    parts: tuple[Segment, ...]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Calls of the attention on CPU."""
        blocks: list[Block] = []
        for tree in self._trees():
            start, end = tree[0].start, tree[-1].end
            if end - start <= _SHORT_ROWS:
                blocks.append(Block(start, end, _tree_bias(tree), tree[0]))
            else:
                blocks += [Block(segment.start, segment.end, None, segment) for segment in tree]
        return tuple(blocks)

    def _trees(self) -> list[list[Segment]]:
        trees: list[list[Segment]] = []
        for segment in self.parts:
            if trees and segment.prefix_end > segment.prefix_start:
                trees[-1].append(segment)
            else:
                trees.append([segment])
        return trees

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Key rows, cumulative query and key lengths, longest query and key: what a variable-length kernel asks."""
        keys = [(*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)) for s in self.parts]
        queries = [s.end - s.start for s in self.parts]
        lengths_k = [len(rows) for rows in keys]
        rows = torch.tensor([row for part in keys for row in part], device=device)
        return rows, _cumulative(queries, device), _cumulative(lengths_k, device), max(queries), max(lengths_k)


def packed_attention(
    module: nn.Module,
    query_1AND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    segments: Segments | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: output [1, N, A, D]; without `segments` the row is one causal sequence.

    Raises:
        ValueError: more than one row in the batch, or a mask.
    """
    if query_1AND.shape[0] != 1 or attention_mask is not None:
        raise ValueError("packed attention takes one row of segments and no mask; pad with another attention instead")
    if segments is None:
        segments = Segments((Segment(0, query_1AND.shape[2], 0, 0),))
    if query_1AND.is_cuda:
        return _varlen(query_1AND, key_1KND, value_1KND, scaling, segments), None
    outputs = [_attend(block, query_1AND, key_1KND, value_1KND, scaling) for block in segments.blocks]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(block: Block, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    rows = slice(block.start, block.end)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if block.bias_SS is not None:
        return _short(query[:, :, rows], key[:, :, rows], value[:, :, rows], block.bias_SS, scale)
    prefix = slice(block.segment.prefix_start, block.segment.prefix_end)
    mask = None
    keys, values = key[:, :, rows], value[:, :, rows]
    if prefix.stop > prefix.start:
        keys = torch.cat([key[:, :, prefix], keys], dim=2)
        values = torch.cat([value[:, :, prefix], values], dim=2)
        length = block.end - block.start
        mask = torch.ones(length, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - length)
    return scaled_dot_product_attention(
        query[:, :, rows],
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _short(query_1ASD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor, bias_SS: Tensor, scale: float) -> Tensor:
    """softmax(scale · query keyᵀ + bias) value; scores and softmax in float32 or wider, as flash kernels do."""
    _, heads, rows, size = query_1ASD.shape
    key_KSD, value_KSD = key_1KSD[0], value_1KSD[0]
    query_KQD = query_1ASD.reshape(key_KSD.shape[0], -1, size)  # the query heads of a key head, one below the other
    scores_KQS = query_KQD @ key_KSD.transpose(1, 2)
    wide = torch.promote_types(scores_KQS.dtype, torch.float32)
    scores_ASS = scores_KQS.view(heads, rows, rows).to(wide) * scale + bias_SS
    probs_KQS = scores_ASS.softmax(-1).to(value_KSD.dtype).view(scores_KQS.shape)
    return (probs_KQS @ value_KSD).view(1, heads, rows, size)


def _varlen(query_1AND: Tensor, key_1KND: Tensor, value_1KND: Tensor, scaling: float | None, parts: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, starts_q, starts_k, longest_q, longest_k = parts.varlen(query_1AND.device)
    query_NAD, key_NKD, value_NKD = (tensor[0].transpose(0, 1) for tensor in (query_1AND, key_1KND, value_1KND))
    output_NAD = varlen_attn(
        query_NAD.contiguous(),
        key_NKD.index_select(0, rows),
        value_NKD.index_select(0, rows),
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        scale=scaling,
        window_size=(-1, 0),  # causal, aligned at the last key
        enable_gqa=query_NAD.shape[1] != key_NKD.shape[1],
    )
    return output_NAD[None]


def _tree_bias(tree: list[Segment]) -> Tensor:
    """0 where a row attends (causally, to its own segment and to the prompt), -inf elsewhere."""
    owner = torch.repeat_interleave(torch.arange(len(tree)), torch.tensor([s.end - s.start for s in tree]))
    allowed = owner[:, None] == owner[None, :]
    allowed[:, : tree[0].end - tree[0].start] = True
    return torch.zeros(allowed.shape).masked_fill_(~allowed.tril_(), -torch.inf)


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
