"""The projection to the vocabulary, chunk by chunk: the N·V logits of a batch never exist at once.

N predicted tokens, n tokens of a chunk, H hidden, V vocabulary. A chunk's loss is evaluated where its logits are, and
its gradients are taken at once, so nothing is projected twice: three products of n·H·V a chunk, as without chunks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 64 MiB of float32: the largest that any tensor of logits gets. Larger chunks were not faster, see docs/results.
CHUNK_ELEMENTS = 1 << 24

# off: zeros, at no cost; metric: a constant for the gradient; loss: differentiable.
EntropyMode = Literal["off", "metric", "loss"]
_SUMMED_ROWS = 256
Stats = dict[str, Tensor]
# (log-probabilities [n], entropies [n], which of the N tokens) -> (loss, stats); stats that end in _max combine by
# maximum, all others by sum.
ChunkLoss = Callable[[Tensor, Tensor, slice], tuple[Tensor, Stats]]


@torch.no_grad()
def score_tokens(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, tokens_N: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens_N` and entropies under softmax(logits / temperature): both [N] in nats, float32."""
    logprobs_N = torch.empty(len(tokens_N), dtype=_wide(hidden_NH), device=hidden_NH.device)
    entropies_N = torch.empty_like(logprobs_N)
    buffers = _Buffers(hidden_NH, weight_VH, bias_V)
    for part in buffers.parts:
        logprobs_nV = buffers.log_softmax(hidden_NH[part], temperature)
        logprobs_N[part] = _picked(logprobs_nV, tokens_N[part])
        entropies_N[part] = _entropy(logprobs_nV, buffers.exp(logprobs_nV))
    return logprobs_N, entropies_N


def token_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    loss: ChunkLoss,
    *,
    temperature: float,
    entropy: EntropyMode = "off",
) -> tuple[Tensor, Stats]:
    """Sum over chunks of a loss of the tokens' log-probabilities, differentiable in hidden states and weights.

    Equal to projecting everything and calling `loss` once where `loss` is a sum over tokens. `loss` sees detached
    leaves: it must not reach for gradients by another way.
    """
    stats: Counter[str] = Counter()
    total: Tensor = _TokenLoss.apply(hidden_NH, weight_VH, bias_V, tokens_N, loss, temperature, entropy, stats)
    return total, dict(stats)  # type: ignore[arg-type]


def add_stats(total: Counter[str], more: dict[str, Any]) -> None:
    """Keys that end in _max combine by maximum, all others by sum."""
    for name, number in more.items():
        total[name] = max(total[name], number) if name.endswith("_max") else total[name] + number


class _TokenLoss(torch.autograd.Function):
    """Gradients are taken in the forward pass, where a chunk's softmax is at hand, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        tokens_N: Tensor,
        loss: ChunkLoss,
        temperature: float,
        entropy: EntropyMode,
        stats: Counter[str],
    ) -> Tensor:
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden_NH = torch.zeros_like(hidden_NH) if want_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=_wide(weight_VH)) if want_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=_wide(bias_V)) if want_bias and bias_V is not None else None
        total = torch.zeros((), dtype=_wide(hidden_NH), device=hidden_NH.device)
        buffers = _Buffers(hidden_NH, weight_VH, bias_V)
        for part in buffers.parts:
            logprobs_nV = buffers.log_softmax(hidden_NH[part], temperature)
            picked_n = _picked(logprobs_nV, tokens_N[part]).requires_grad_()
            probs_nV = logprobs_nV.exp_() if entropy == "off" else buffers.exp(logprobs_nV)
            entropy_n = torch.zeros_like(picked_n) if entropy == "off" else _entropy(logprobs_nV, probs_nV)
            entropy_n.requires_grad_(entropy == "loss")
            with torch.enable_grad():
                value, chunk_stats = loss(picked_n, entropy_n, part)
            total += value.detach()
            add_stats(stats, chunk_stats)
            inputs = [picked_n, entropy_n] if entropy == "loss" else [picked_n]
            grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
            # d logprob / d logit_v = 1[v = token] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy).
            pull_n1 = grads[0][:, None]
            if entropy == "loss":
                slope_nV = logprobs_nV.add_(entropy_n.detach()[:, None]).masked_fill_(probs_nV == 0, 0)
                probs_nV.mul_(slope_nV.mul_(grads[1][:, None]).add_(pull_n1))
            else:
                probs_nV.mul_(pull_n1)
            down_nV = probs_nV.neg_().scatter_add_(-1, tokens_N[part, None], pull_n1)
            if temperature != 1:
                down_nV.div_(temperature)
            low_nV = buffers.low(down_nV)
            if grad_hidden_NH is not None:
                torch.mm(low_nV, weight_VH, out=grad_hidden_NH[part])
            if grad_weight_VH is not None:
                buffers.add_weight_gradient(grad_weight_VH, low_nV, hidden_NH[part])
            if grad_bias_V is not None:
                grad_bias_V += down_nV.sum(0)
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH, grad_bias_V)
        ctx.weight_dtype = weight_VH.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (None if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors)
        weight = None if weight is None else weight.to(ctx.weight_dtype)
        bias = None if bias is None else bias.to(ctx.weight_dtype)
        return hidden, weight, bias, None, None, None, None, None


class _Buffers:
    """Memory for one chunk, used for all: fresh blocks of this size cost more in page faults than the arithmetic."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
        self.weight_VH, self.bias_V = weight_VH, bias_V
        vocabulary = weight_VH.shape[0]
        size = min(max(1, CHUNK_ELEMENTS // vocabulary), max(1, len(hidden_NH)))
        self.parts = [slice(start, start + size) for start in range(0, len(hidden_NH), size)]
        self._low_nV = hidden_NH.new_empty(size, vocabulary)
        self._wide_nV = hidden_NH.new_empty(size, vocabulary, dtype=_wide(hidden_NH))
        self._logprobs_nV = torch.empty_like(self._wide_nV)
        self._weight_gradient_VH: Tensor | None = None

    def log_softmax(self, hidden_nH: Tensor, temperature: float) -> Tensor:
        """log_softmax(logits / temperature) [n, V] in float32 or wider; overwritten by the next call."""
        rows = slice(len(hidden_nH))
        logits_nV = torch.mm(hidden_nH, self.weight_VH.T, out=self._low_nV[rows])
        if self.bias_V is not None:
            logits_nV += self.bias_V
        wide_nV = self._wide_nV[rows].copy_(logits_nV)
        if temperature != 1:
            wide_nV /= temperature
        logprobs_nV: Tensor = torch.ops.aten._log_softmax.out(wide_nV, -1, False, out=self._logprobs_nV[rows])
        return logprobs_nV

    def exp(self, logprobs_nV: Tensor) -> Tensor:
        return torch.exp(logprobs_nV, out=self._wide_nV[: len(logprobs_nV)])

    def low(self, gradient_nV: Tensor) -> Tensor:
        """In the type of the hidden states, where the logits were."""
        return self._low_nV[: len(gradient_nV)].copy_(gradient_nV)

    def add_weight_gradient(self, total_VH: Tensor, gradient_nV: Tensor, hidden_nH: Tensor) -> None:
        if self._weight_gradient_VH is None:
            self._weight_gradient_VH = torch.empty_like(self.weight_VH)
        torch.mm(gradient_nV.T, hidden_nH, out=self._weight_gradient_VH)
        # A sum of two types makes a copy of its operand: slice by slice it stays in the cache.
        for sums, parts in zip(total_VH.split(_SUMMED_ROWS), self._weight_gradient_VH.split(_SUMMED_ROWS), strict=True):
            sums += parts


def _picked(logprobs_nV: Tensor, tokens_n: Tensor) -> Tensor:
    return logprobs_nV.gather(-1, tokens_n[:, None]).squeeze(-1)


def _entropy(logprobs_nV: Tensor, probs_nV: Tensor) -> Tensor:
    """A forbidden token (log-probability -inf) adds nothing; the product without it is one pass over memory."""
    entropy_n = -torch.linalg.vecdot(probs_nV, logprobs_nV)
    if entropy_n.isnan().any():
        entropy_n = -(probs_nV * logprobs_nV.masked_fill(logprobs_nV == -math.inf, 0)).sum(-1)
    return entropy_n


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
