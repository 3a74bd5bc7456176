"""Policy loss, value loss and KL estimates.

B responses, T response tokens. mask_BT: 1 = token that counts, bool or 0/1 of any type. What
padding holds, NaN included, never reaches a result or a gradient. Losses are sums over valid
tokens divided by `num_tokens`, the global count of valid tokens in the optimizer step: losses of
micro-batches and ranks add up to the loss of the whole. Results are float32, or float64 where an
input is. Stats are detached scalars that combine over micro-batches and ranks: keys that end in
`_max` by maximum, all others by sum.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

KL_ESTIMATORS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # exp(20) = 5e8; float32 exp overflows at 88.7, and 0 * inf is NaN


def policy_loss(
    logprobs_BT: Tensor,
    proximal_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    behavior_weight_cap: float,
    num_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Decoupled PPO loss: -Σ weight · min(ratio · A, clip(ratio) · A) / num_tokens, a scalar.

    ratio = policy / proximal, clipped to [1 - clip_low, 1 + clip_high]; weight = proximal /
    behavior, at most behavior_weight_cap, a constant for the gradient. Hilton et al. 2022, "Batch
    size-invariance for policy optimization", section "Decoupled policy objectives"; truncated
    weights: Espeholt et al. 2018, "IMPALA", section 4.1. With proximal = behavior it is PPO.

    A ratio is held within exp(±MAX_LOG_RATIO), without gradient beyond.

    Args:
        logprobs_BT: nats, under the weights being trained; the only input that gets a gradient.
        proximal_logprobs_BT: nats, under the weights at the start of the update.
        behavior_logprobs_BT: nats, under the weights that sampled the token.

    Returns:
        loss, and stats: `tokens`, `clipped_tokens` (the clip took the gradient away),
        `approx_kl_sum` (k3 of proximal against policy, nats), `ratio_max`, `behavior_weight_sum`
        (after truncation), `truncated_weights` (tokens at the cap).

    Raises:
        ValueError: shapes that disagree or a coefficient out of range.
    """
    _check(
        mask_BT,
        num_tokens,
        logprobs_BT=logprobs_BT,
        proximal_logprobs_BT=proximal_logprobs_BT,
        behavior_logprobs_BT=behavior_logprobs_BT,
        advantages_BT=advantages_BT,
    )
    _check_non_negative(clip_low=clip_low, clip_high=clip_high)
    if not (math.isfinite(behavior_weight_cap) and behavior_weight_cap > 0):
        raise ValueError(f"behavior_weight_cap is {behavior_weight_cap}, allowed is a finite number > 0")
    valid_BT = mask_BT != 0
    logprobs_BT = _valid_only(logprobs_BT, valid_BT)
    proximal_BT = _valid_only(proximal_logprobs_BT.detach(), valid_BT)
    behavior_BT = _valid_only(behavior_logprobs_BT.detach(), valid_BT)
    advantages_BT = _valid_only(advantages_BT.detach(), valid_BT)

    log_ratio_BT = (logprobs_BT - proximal_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BT = log_ratio_BT.exp()
    log_weight_BT = proximal_BT - behavior_BT
    log_cap = math.log(behavior_weight_cap)
    weight_BT = log_weight_BT.clamp(max=log_cap).exp()  # capped before exp: never inf

    surrogate_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    loss = -(weight_BT * torch.minimum(surrogate_BT, clipped_BT)).sum() / num_tokens
    with torch.no_grad():
        stats = {
            "tokens": valid_BT.sum(),
            "clipped_tokens": (clipped_BT < surrogate_BT).sum(),
            "approx_kl_sum": (torch.expm1(log_ratio_BT) - log_ratio_BT).sum(),
            "ratio_max": functional.pad((ratio_BT * valid_BT).flatten(), (0, 1)).max(),
            "behavior_weight_sum": (weight_BT * valid_BT).sum(),
            "truncated_weights": ((log_weight_BT > log_cap) & valid_BT).sum(),
        }
    return loss, stats


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float,
    num_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss: Σ max((V - R)², (clip(V) - R)²) / 2 / num_tokens, a scalar.

    clip(V) keeps V within ±clip of the value at the start of the update, in reward units; inf
    turns it off. From the PPO2 code of OpenAI Baselines; Engstrom et al. 2020, "Implementation
    Matters in Deep Policy Gradients", section 3 (value function clipping).

    Args:
        values_BT: predictions being trained; the only input that gets a gradient.
        old_values_BT: predictions at the start of the update.
        returns_BT: targets, from `learner.advantage.gae`.

    Returns:
        loss, and stats: `clipped_values` (tokens where the clip took the gradient away),
        `value_error_squared_sum` (Σ (V - R)², unclipped).

    Raises:
        ValueError: shapes that disagree or a coefficient out of range.
    """
    _check(mask_BT, num_tokens, values_BT=values_BT, old_values_BT=old_values_BT, returns_BT=returns_BT)
    _check_non_negative(clip=clip)
    valid_BT = mask_BT != 0
    values_BT = _valid_only(values_BT, valid_BT)
    old_values_BT = _valid_only(old_values_BT.detach(), valid_BT)
    returns_BT = _valid_only(returns_BT.detach(), valid_BT)

    change_BT = values_BT - old_values_BT
    error_BT = (values_BT - returns_BT).square()
    clipped_error_BT = (old_values_BT + change_BT.clamp(-clip, clip) - returns_BT).square()
    loss = 0.5 * torch.maximum(error_BT, clipped_error_BT).sum() / num_tokens
    with torch.no_grad():
        stats = {
            "clipped_values": ((change_BT.abs() > clip) & (clipped_error_BT > error_BT)).sum(),
            "value_error_squared_sum": error_BT.sum(),
        }
    return loss, stats


def kl(
    logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    *,
    estimator: str,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Estimate of KL(policy || reference) at each token the policy sampled: [B, T], in nats.

    With d = log reference - log policy: k1 = -d (unbiased, any sign), k2 = d² / 2 (biased, never
    negative, little variance), k3 = exp(d) - 1 - d (unbiased, never negative). Schulman 2020,
    "Approximating KL Divergence". d is held below MAX_LOG_RATIO in k3: one token that the policy
    has all but given up would otherwise make exp overflow, and inf would swamp the batch.

    Gradients reach logprobs_BT only. With a mask the result is 0 in padding, whatever it holds;
    without one, mask the inputs or results with `torch.where` before summing.

    Raises:
        ValueError: an unknown estimator or shapes that disagree.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, allowed are {', '.join(KL_ESTIMATORS)}")
    valid_BT = torch.ones_like(logprobs_BT, dtype=torch.bool) if mask_BT is None else mask_BT != 0
    _check_shapes(valid_BT, logprobs_BT=logprobs_BT, reference_logprobs_BT=reference_logprobs_BT)
    reference_BT = _valid_only(reference_logprobs_BT.detach(), valid_BT)
    log_ratio_BT = reference_BT - _valid_only(logprobs_BT, valid_BT)
    if estimator == "k1":
        return -log_ratio_BT
    if estimator == "k2":
        return 0.5 * log_ratio_BT.square()
    log_ratio_BT = log_ratio_BT.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio_BT) - log_ratio_BT


def _valid_only(x_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """x where valid, else 0, before any arithmetic: NaN * 0 is NaN, backward too."""
    return torch.where(valid_BT, x_BT, 0).to(torch.promote_types(x_BT.dtype, torch.float32))


def _check(mask_BT: Tensor, num_tokens: int, **tensors: Tensor) -> None:
    if num_tokens <= 0:
        raise ValueError(f"num_tokens is {num_tokens}, allowed is the global count, at least 1")
    _check_shapes(mask_BT, **tensors)


def _check_shapes(mask_BT: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != mask_BT.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the mask {tuple(mask_BT.shape)}")


def _check_non_negative(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}, allowed is a number >= 0")
