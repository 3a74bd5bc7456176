"""Policy loss, value loss, KL estimates and penalty, entropy bonus, and the weights that aggregate tokens.

B responses, T response tokens. mask_BT: 1 = token that counts, bool or 0/1 of any type. What
padding holds, NaN included, never reaches a result or a gradient. Losses are sums over valid
tokens divided by `num_tokens`, the global count of valid tokens in the optimizer step: losses of
micro-batches and ranks add up to the loss of the whole. Other averages than the one over tokens are
weights in that sum (`token_weights`), fixed for the whole minibatch before it is cut. Losses look
at one token at a time, so tokens may come as [B, T] or as flat chunks [1, N]; `token_weights` and
`effective_behavior` need whole responses, a row each. Results are float32, or float64 where an
input is. Stats are detached scalars that combine over micro-batches and ranks: keys that end in
`_max` by maximum, all others by sum.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

KL_ESTIMATORS = ("k1", "k2", "k3")
KL_LOSS_ESTIMATORS = ("k2", "k3")
AGGREGATIONS = ("token", "sequence", "constant")
WEIGHT_LEVELS = ("token", "sequence")
MAX_LOG_RATIO = 20.0  # exp(20) = 5e8; float32 exp overflows at 88.7, and 0 * inf is NaN
# exp(-1000) is 0 and exp(1000) above any cap, in float64 too: a sum held within loses nothing.
_MAX_SEQUENCE_LOG_RATIO = 1000.0
_IMPOSSIBLE = -1e6  # nats: exp is 0 in any type, and float32 next to it is too coarse to add a log-ratio to


@torch.no_grad()
def token_weights(mask_BT: Tensor, *, aggregation: str, max_tokens: int | None = None) -> Tensor:
    """Weights [B, T] with which Σ weight · loss / num_tokens is the average asked for; 0 in padding.

    With N the valid tokens of the mask, R its responses (rows with a token) and n those of the row:

    - "token": 1, every token counts the same. Yu et al. 2025, "DAPO", section 3.3, eq. 12.
    - "sequence": N / (R · n), the mean over responses of the mean over their tokens. Shao et al.
      2024, "DeepSeekMath", section 4.1.1, eq. 3. Tokens of long responses count less.
    - "constant": N / (R · max_tokens), the mean over responses of their sum / max_tokens. Liu et
      al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO), section 3.2. Every token counts
      the same, whatever the lengths in this minibatch are.

    The mask is that of the whole minibatch, before it is cut into micro-batches or ranks, and the
    losses' `num_tokens` its N.

    Args:
        max_tokens: the length limit of a response; read by "constant" only.

    Raises:
        ValueError: an unknown aggregation, a mask that is not [B, T], "constant" without a limit.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}, allowed are {', '.join(AGGREGATIONS)}")
    if mask_BT.dim() != 2:
        raise ValueError(f"mask_BT has shape {tuple(mask_BT.shape)}, allowed is [B, T]")
    if aggregation == "constant" and (max_tokens is None or max_tokens < 1):
        raise ValueError(f'max_tokens is {max_tokens}, allowed with aggregation "constant" is at least 1')
    valid_BT = mask_BT != 0
    lengths_B1 = valid_BT.sum(dim=1, keepdim=True).double()
    num_responses = (lengths_B1 > 0).sum().clamp(min=1)
    if aggregation == "token":
        weights_B1 = torch.ones_like(lengths_B1)
    elif aggregation == "sequence":
        weights_B1 = lengths_B1.sum() / (num_responses * lengths_B1.clamp(min=1))
    else:
        assert max_tokens is not None
        weights_B1 = lengths_B1.sum() / (num_responses * max_tokens) * torch.ones_like(lengths_B1)
    return _valid_only(weights_B1, valid_BT).to(torch.promote_types(mask_BT.dtype, torch.float32))


@torch.no_grad()
def effective_behavior(
    proximal_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, mask_BT: Tensor, *, level: str
) -> Tensor:
    """Behaviour log-probs [B, T] that make `policy_loss` truncate token or whole-response weights.

    - "token": as they are. The weight of a token is its own proximal / behavior ratio.
    - "sequence": such that proximal - result is, at every token of a response, the sum over the
      response of proximal - behavior: the weight of each token is that of the whole response, the
      product of its ratios. Unbiased where the token's is not, as it also corrects for which
      states were visited, at a variance that grows with length; the cap bounds it (Ionides 2008,
      "Truncated Importance Sampling").

    The sum is taken in float64 and held within ±1000 nats, where its exp is 0 or above any cap. A
    response with a token that proximal gives probability 0 has weight 0.

    Returns:
        float32 or wider, 0 in padding, without gradient.

    Raises:
        ValueError: an unknown level or shapes that disagree.
    """
    if level not in WEIGHT_LEVELS:
        raise ValueError(f"level is {level!r}, allowed are {', '.join(WEIGHT_LEVELS)}")
    _check_shapes(mask_BT, proximal_logprobs_BT=proximal_logprobs_BT, behavior_logprobs_BT=behavior_logprobs_BT)
    valid_BT = mask_BT != 0
    behavior_BT = _valid_only(behavior_logprobs_BT, valid_BT)
    if level == "token":
        return behavior_BT
    proximal_BT = _valid_only(proximal_logprobs_BT, valid_BT)
    log_ratio_B1 = (proximal_BT.double() - behavior_BT.double()).sum(dim=1, keepdim=True)
    log_ratio_B1 = log_ratio_B1.clamp(-_MAX_SEQUENCE_LOG_RATIO, _MAX_SEQUENCE_LOG_RATIO)
    # Probability 0, as -inf or what stands for it: -inf - -inf is NaN and -3e38 swallows the sum; exp(-inf - 0) is 0.
    impossible_BT = proximal_BT < _IMPOSSIBLE
    effective_BT = (proximal_BT.double() - log_ratio_B1).masked_fill(impossible_BT, 0)
    wide = torch.promote_types(proximal_BT.dtype, behavior_BT.dtype)
    return torch.where(valid_BT, effective_BT, 0).to(wide)


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
    token_weights_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Decoupled PPO loss: -Σ weight · min(ratio · A, clip(ratio) · A) / num_tokens, a scalar.

    ratio = policy / proximal, clipped to [1 - clip_low, 1 + clip_high]; weight = proximal /
    behavior, at most behavior_weight_cap, a constant for the gradient. Hilton et al. 2022, "Batch
    size-invariance for policy optimization", section "Decoupled policy objectives"; truncated
    weights: Espeholt et al. 2018, "IMPALA", section 4.1. With proximal = behavior it is PPO.

    A ratio is held within exp(±MAX_LOG_RATIO), without gradient beyond. A batch without any valid
    token is 0, with zero gradients: a micro-batch may be empty where others are not.

    Args:
        logprobs_BT: nats, under the weights being trained; the only input that gets a gradient.
        proximal_logprobs_BT: nats, under the weights at the start of the update.
        behavior_logprobs_BT: nats, under the weights that sampled the token; for weights of whole
            responses what `effective_behavior` makes of them.
        token_weights_BT: constants from `token_weights`; None is 1 everywhere. Stats stay unweighted.

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
    share_BT = _shares(token_weights_BT, valid_BT)

    log_ratio_BT = (logprobs_BT - proximal_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BT = log_ratio_BT.exp()
    log_weight_BT = proximal_BT - behavior_BT
    log_cap = math.log(behavior_weight_cap)
    weight_BT = log_weight_BT.clamp(max=log_cap).exp()  # capped before exp: never inf

    surrogate_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    loss = -(share_BT * weight_BT * torch.minimum(surrogate_BT, clipped_BT)).sum() / num_tokens
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


def kl_penalty_loss(
    logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    estimator: str,
    num_tokens: int,
    token_weights_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL to the reference as a term of the loss: Σ weight · k / num_tokens, a scalar in nats.

    What descends is the gradient, and an estimate of the KL need not have the KL's gradient. With
    p the policy, q the reference and tokens sampled from p itself, in the states that they visit:

    - "k2": log(p/q) · ∇log p, whose expectation is ∇KL(p || q), the reverse KL: what KL in the
      reward (`learner.advantage.shape_rewards`) descends too, in the token's own state.
    - "k3": (1 - q/p) · ∇log p, whose expectation is -Σ q · ∇log p = ∇KL(q || p), the forward KL,
      although the value of k3 estimates the reverse one. It covers the reference's mass rather
      than seek a mode, its pull on a token above the reference is at most 1, below it without
      bound up to MAX_LOG_RATIO, beyond which there is none. It is GRPO's (Shao et al. 2024,
      "DeepSeekMath", section 4.1.1, eq. 4).
    - "k1" is refused: ∇log p has expectation 0, so it moves nothing on average and adds noise.

    Liu et al. 2025, "Rethinking KL Regularization in RLHF" (arXiv 2510.01555). Tokens sampled from
    older weights bias both; detached ratios p / behavior in `token_weights_BT` correct for it.
    Either way a token answers for its own state only, not for the states that it leads to: KL in
    the reward, with its sum over later tokens, does both.

    Args:
        logprobs_BT: nats, under the weights being trained; the only input that gets a gradient.
        reference_logprobs_BT: nats, of the same tokens under the reference.
        token_weights_BT: constants from `token_weights`; None is 1 everywhere.

    Returns:
        loss, and stats, unweighted: `reference_kl_sum` (Σ log p - log q, k1, nats),
        `reference_log_ratio_max` (the largest |log p - log q|).

    Raises:
        ValueError: an estimator other than k2 and k3, or shapes that disagree.
    """
    if estimator == "k1":
        raise ValueError("estimator is 'k1', whose expected gradient is zero, allowed in a loss are k2, k3")
    if estimator not in KL_LOSS_ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, allowed in a loss are {', '.join(KL_LOSS_ESTIMATORS)}")
    _check(mask_BT, num_tokens, logprobs_BT=logprobs_BT, reference_logprobs_BT=reference_logprobs_BT)
    penalty_BT = kl(logprobs_BT, reference_logprobs_BT, estimator=estimator, mask_BT=mask_BT)
    loss = (_shares(token_weights_BT, mask_BT != 0) * penalty_BT).sum() / num_tokens
    with torch.no_grad():
        log_ratio_BT = kl(logprobs_BT, reference_logprobs_BT, estimator="k1", mask_BT=mask_BT)
        stats = {
            "reference_kl_sum": log_ratio_BT.sum(),
            "reference_log_ratio_max": functional.pad(log_ratio_BT.abs().flatten(), (0, 1)).max(),
        }
    return loss, stats


def entropy_bonus(
    entropy_BT: Tensor, mask_BT: Tensor, *, num_tokens: int, token_weights_BT: Tensor | None = None
) -> Tensor:
    """-Σ weight · entropy / num_tokens, a scalar in nats: times a coefficient >= 0, it is a loss that keeps
    the policy's entropy up. Williams & Peng 1991, "Function Optimization Using Connectionist Reinforcement
    Learning Algorithms"; Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", section 4.

    Args:
        entropy_BT: nats, of the policy's whole distribution in the state of each token, with its gradient.
        token_weights_BT: constants from `token_weights`; None is 1 everywhere.

    Raises:
        ValueError: shapes that disagree or num_tokens below 1.
    """
    _check(mask_BT, num_tokens, entropy_BT=entropy_BT)
    valid_BT = mask_BT != 0
    return -(_shares(token_weights_BT, valid_BT) * _valid_only(entropy_BT, valid_BT)).sum() / num_tokens


def _shares(token_weights_BT: Tensor | None, valid_BT: Tensor) -> Tensor:
    """The weight of each valid token in the average; 1 where none are given, 0 in padding."""
    if token_weights_BT is None:
        return valid_BT.float()
    _check_shapes(valid_BT, token_weights_BT=token_weights_BT)
    return _valid_only(token_weights_BT.detach(), valid_BT)


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
