"""Attention within the segments of a packed row, registered with transformers under PACKED_ATTENTION.

N rows, Q query and S key rows of a block, A heads, K key heads, D head size. A segment's rows attend causally to each
other and wholly to its prefix (a shared prompt). On CPU a short tree (a prompt and its responses) is attended whole
under one small mask, a longer one segment by segment, with plain matrix products: in bf16 their backward pass takes a
fifth to a half of the time of the flash kernel's. Like it they recompute the probabilities in the backward pass, so
memory does not grow with the square; the flash kernel takes what is longer still. A dense mask over all N rows would
double the work of a forward pass. On GPU it is one variable-length kernel (torch.nn.attention.varlen), keys of shared
prompts gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED_ATTENTION = "headrace_packed"
# Up to so many products a head, a block is computed densely: the tree of a group, or one segment.
_DENSE_TREE = 256 * 256
_DENSE_SEGMENT = 768 * 768


class Segment(NamedTuple):
    """Rows start to end, after the prefix rows prefix_start to prefix_end (none where those are equal)."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass(frozen=True)
class Block:
    """Rows under one call on CPU: they attend to each other and to the rows of block `prefix`.

    `bias_QS` is 0 or -inf; None is causal, for the flash kernel.
    """

    rows: int
    bias_QS: Tensor | None
    prefix: int | None = None


@dataclass(frozen=True)
class Segments:
    """Who attends to whom in a packed row. Segments cover the rows in order, without gaps."""

    parts: tuple[Segment, ...]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Calls of the attention on CPU."""
        blocks: list[Block] = []
        for tree in self._trees():
            rows = tree[-1].end - tree[0].start
            if rows * rows <= _DENSE_TREE:
                blocks.append(Block(rows, _tree_bias(tree)))
                continue
            prompt = len(blocks)
            for segment in tree:
                prefix = prompt if segment.prefix_end > segment.prefix_start else None
                blocks.append(Block(segment.end - segment.start, _causal_bias(segment), prefix))
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
    # Split, not sliced: the gradient of a slice is as large as what it was cut from.
    lengths = [block.rows for block in segments.blocks]
    queries, keys, values = (each.split(lengths, dim=2) for each in (query_1AND, key_1KND, value_1KND))
    outputs = []
    for number, block in enumerate(segments.blocks):
        query, key, value = queries[number], keys[number], values[number]
        prefix_rows = 0
        if block.prefix is not None:
            key = torch.cat([keys[block.prefix], key], dim=2)
            value = torch.cat([values[block.prefix], value], dim=2)
            if block.bias_QS is None:  # the kernel knows squares only: the prompt's rows once more, and away again
                prefix_rows = segments.blocks[block.prefix].rows
                query = torch.cat([queries[block.prefix], query], dim=2)
        outputs.append(_attend(query, key, value, block.bias_QS, scaling)[:, :, prefix_rows:])
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query_1AQD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor, bias_QS: Tensor | None, scaling: float | None
) -> Tensor:
    scale = query_1AQD.shape[-1] ** -0.5 if scaling is None else scaling
    if bias_QS is None:
        grouped = query_1AQD.shape[1] != key_1KSD.shape[1]
        return scaled_dot_product_attention(
            query_1AQD, key_1KSD, value_1KSD, is_causal=True, scale=scale, enable_gqa=grouped
        )
    output_AQD: Tensor = _DenseAttention.apply(query_1AQD[0], key_1KSD[0], value_1KSD[0], bias_QS, scale)
    return output_AQD[None]


class _DenseAttention(torch.autograd.Function):
    """softmax(scale · query keyᵀ + bias) value; scores and softmax in float32 or wider, as flash kernels do.

    Dao et al. 2022, "FlashAttention", appendix B.4: the backward pass recomputes the probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any, query_AQD: Tensor, key_KSD: Tensor, value_KSD: Tensor, bias_QS: Tensor, scale: float
    ) -> Tensor:
        probs_AQS = _probs(query_AQD, key_KSD, bias_QS, scale).to(value_KSD.dtype)
        output_AQD = (_by_key_head(probs_AQS, key_KSD) @ value_KSD).view(query_AQD.shape)
        ctx.save_for_backward(query_AQD, key_KSD, value_KSD, bias_QS, output_AQD)
        ctx.scale = scale
        return output_AQD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AQD: Tensor) -> tuple[Tensor | None, ...]:
        query_AQD, key_KSD, value_KSD, bias_QS, output_AQD = ctx.saved_tensors
        probs_AQS = _probs(query_AQD, key_KSD, bias_QS, ctx.scale)
        grad_KQD = _by_key_head(grad_AQD, key_KSD)
        low_AQS = probs_AQS.to(value_KSD.dtype)
        grad_value_KSD = _by_key_head(low_AQS, key_KSD).transpose(1, 2) @ grad_KQD
        mean_AQ1 = (grad_AQD * output_AQD).sum(-1, keepdim=True, dtype=probs_AQS.dtype)
        grad_probs_AQS = (grad_KQD @ value_KSD.transpose(1, 2)).view(probs_AQS.shape)
        grad_scores_AQS = probs_AQS.mul_(grad_probs_AQS - mean_AQ1).mul_(ctx.scale).to(query_AQD.dtype)
        grad_scores_KQS = _by_key_head(grad_scores_AQS, key_KSD)
        grad_query_AQD = (grad_scores_KQS @ key_KSD).view(query_AQD.shape)
        grad_key_KSD = grad_scores_KQS.transpose(1, 2) @ _by_key_head(query_AQD, key_KSD)
        return grad_query_AQD, grad_key_KSD, grad_value_KSD, None, None


def _probs(query_AQD: Tensor, key_KSD: Tensor, bias_QS: Tensor, scale: float) -> Tensor:
    scores_KQS = _by_key_head(query_AQD, key_KSD) @ key_KSD.transpose(1, 2)
    scores_AQS = scores_KQS.view(query_AQD.shape[0], *bias_QS.shape)
    # Float32 or wider, as the bias is. The fused softmax takes -inf in its stride; exp of it is ten times slower.
    return torch.add(bias_QS, scores_AQS, alpha=scale).softmax(-1)


def _by_key_head(values_AQX: Tensor, key_KSD: Tensor) -> Tensor:
    """The query heads of a key head one below the other: [K, A / K · Q, X]."""
    return values_AQX.reshape(key_KSD.shape[0], -1, values_AQX.shape[-1])


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
    assert isinstance(output_NAD, Tensor)  # without return_aux
    return output_NAD[None]


def _tree_bias(tree: list[Segment]) -> Tensor:
    """0 where a row attends (causally, to its own segment and to the prompt), -inf elsewhere."""
    owner = torch.repeat_interleave(torch.arange(len(tree)), torch.tensor([s.end - s.start for s in tree]))
    allowed = owner[:, None] == owner[None, :]
    allowed[:, : tree[0].end - tree[0].start] = True
    return torch.zeros(allowed.shape).masked_fill_(~allowed.tril_(), -torch.inf)


def _causal_bias(segment: Segment) -> Tensor | None:
    """0 where a row attends: to the prefix and to its own segment up to itself. None where that is long."""
    rows, prefix = segment.end - segment.start, segment.prefix_end - segment.prefix_start
    if rows * (prefix + rows) > _DENSE_SEGMENT:
        return None
    return torch.full((rows, prefix + rows), -torch.inf).triu_(prefix + 1)


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
