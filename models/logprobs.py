"""Log-probabilities of sampled tokens and entropies, without a float32 copy of the logits.

B responses, T response tokens, V vocabulary. logits_BTV[:, t] predicts tokens_BT[:, t].
Results are float32, or float64 where the logits are float64.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 23  # 32 MiB of float32: the most that is upcast at once


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of each sampled token under softmax(logits / temperature), in nats.

    Equal to `log_softmax(logits_BTV / temperature)` gathered at `tokens_BT`, but what is kept for
    the backward pass is the logits themselves and one number a token. Where no gradient comes
    in (padding under a mask), none goes out, even if the logits there are NaN.

    Args:
        logits_BTV: raw model outputs, any float type, before the temperature.
        tokens_BT: integer ids in [0, V), padding included.
        temperature: the one the tokens were sampled with, finite and > 0.

    Raises:
        ValueError: a temperature, shape or type that is not as above.
    """
    _check_logits(logits_BTV, temperature)
    if tokens_BT.shape != logits_BTV.shape[:2]:
        raise ValueError(
            f"tokens_BT has shape {tuple(tokens_BT.shape)}, "
            f"logits_BTV {tuple(logits_BTV.shape)} allows {tuple(logits_BTV.shape[:2])}"
        )
    if tokens_BT.is_floating_point() or tokens_BT.is_complex() or tokens_BT.dtype == torch.bool:
        raise ValueError(f"tokens_BT has type {tokens_BT.dtype}, allowed are integers")
    logprobs_BT: Tensor = _TokenLogprobs.apply(logits_BTV, tokens_BT.long(), temperature)
    return logprobs_BT


def entropy(logits_BTV: Tensor, *, temperature: float) -> Tensor:
    """Entropy of softmax(logits / temperature) at each position: [B, T], in nats.

    Differentiable; call it under `torch.no_grad()` for a metric, else every chunk is kept.
    A logit of -inf (a forbidden token) adds nothing.

    Raises:
        ValueError: logits that are not a float [B, T, V], or a temperature not finite and > 0.
    """
    _check_logits(logits_BTV, temperature)
    entropies = []
    for part in _time_slices(logits_BTV):
        logprobs_BtV = _scaled(logits_BTV[:, part], temperature).log_softmax(-1)
        finite_BtV = logprobs_BtV.masked_fill(logprobs_BtV == -math.inf, 0)  # 0 * -inf is NaN
        entropies.append(-(logprobs_BtV.exp() * finite_BtV).sum(-1))
    return torch.cat(entropies, dim=1) if entropies else logits_BTV.new_zeros(logits_BTV.shape[:2])


class _TokenLogprobs(torch.autograd.Function):
    """logit - logsumexp, chunk by chunk; the backward pass recomputes the softmax likewise."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, tokens_BT: Tensor, temperature: float) -> Tensor:
        picked_BT = _scaled(logits_BTV.gather(-1, tokens_BT[..., None]).squeeze(-1), temperature)
        lse_BT = torch.empty_like(picked_BT)
        for part in _time_slices(logits_BTV):
            lse_BT[:, part] = _scaled(logits_BTV[:, part], temperature).logsumexp(-1)
        ctx.save_for_backward(logits_BTV, tokens_BT, lse_BT)
        ctx.temperature = temperature
        return picked_BT - lse_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None]:
        """d logprob / d logit_v = (1[v = token] - softmax_v) / temperature."""
        logits_BTV, tokens_BT, lse_BT = ctx.saved_tensors
        grad_logits_BTV = torch.empty_like(logits_BTV)
        for part in _time_slices(logits_BTV):
            weight_Bt1 = grad_BT[:, part, None] / ctx.temperature
            step_BtV = _scaled(logits_BTV[:, part], ctx.temperature)
            step_BtV.sub_(lse_BT[:, part, None]).exp_().mul_(-weight_Bt1)
            step_BtV.scatter_add_(-1, tokens_BT[:, part, None], weight_Bt1)
            # NaN logits in padding: their incoming gradient is 0, and 0 * NaN is NaN.
            step_BtV.masked_fill_(weight_Bt1 == 0, 0)
            grad_logits_BTV[:, part] = step_BtV
        return grad_logits_BTV, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """A fresh tensor, float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _time_slices(logits_BTV: Tensor) -> Iterator[slice]:
    """Slices over T, so that a view such as `logits[:, start:-1]` is never copied whole."""
    num_rows, num_tokens, vocabulary = logits_BTV.shape
    step = max(1, CHUNK_ELEMENTS // max(1, num_rows * vocabulary))
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def _check_logits(logits_BTV: Tensor, temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, allowed is a finite number > 0")
    if logits_BTV.dim() != 3 or not logits_BTV.is_floating_point():
        raise ValueError(
            f"logits_BTV has shape {tuple(logits_BTV.shape)} and type {logits_BTV.dtype}, "
            "allowed is a float tensor [B, T, V]"
        )
