"""From scores to advantages: overlong penalty, shaped rewards, GAE, whitening, group baselines.

B responses, T response tokens, R = P·G responses (P prompts, G samples a prompt).
mask_BT: 1 = sampled token, contiguous from t=0, bool or 0/1 of any type. What padding holds,
NaN included, never reaches a result; results are 0 there. Everything returned is a target:
no gradient flows through it. Results are float32, or float64 where an input is.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

GROUP_METHODS = ("grpo", "dr_grpo", "rloo", "reinforce++")
_STD_FLOOR = 1e-6  # scores of equal responses differ in the last bits: not a signal to amplify
# The same score through another batch is summed in another order: a few units in float32's last place (1.2e-7 of its
# size), about 8 of which are allowed. Below size 1 the floor above, which leaves such a group next to no advantage.
_EQUAL_TOLERANCE = 1e-6


@torch.no_grad()
def overlong_penalty(lengths_B: Tensor, *, max_tokens: int, buffer_tokens: int, penalty: float) -> Tensor:
    """What to add to the score of a long response: [B], from 0 down to -penalty, in reward units.

    0 up to max_tokens - buffer_tokens, then linear, -penalty at max_tokens and above. Yu et al. 2025, "DAPO",
    section 3.4, eq. 13 (soft overlong punishment), where penalty is 1, max_tokens L_max and buffer_tokens L_cache.

    Args:
        lengths_B: response lengths in tokens.
        max_tokens: the length limit of a response.

    Raises:
        ValueError: lengths that are not [B], or a limit, buffer or penalty out of range.
    """
    if lengths_B.dim() != 1:
        raise ValueError(f"lengths_B has shape {tuple(lengths_B.shape)}, allowed is [B]")
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens is {buffer_tokens}, allowed is 1 to max_tokens = {max_tokens}")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty is {penalty}, allowed is a finite number >= 0")
    over_B = max_tokens - buffer_tokens - lengths_B.to(_wide(lengths_B.dtype))
    return penalty * (over_B / buffer_tokens).clamp(-1, 0)


@torch.no_grad()
def shape_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, *, kl_coef: float) -> Tensor:
    """Rewards [B, T]: -kl_coef · kl at each token, plus the score at the last sampled one.

    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2, eq. 2.
    A response whose last state is bootstrapped gets score 0 here and its value in `gae`'s
    `bootstrap_B`; a score and a bootstrap value for one response count its future twice.

    Args:
        scores_B: one score a response, in reward units.
        kl_BT: per-token KL estimate in nats (`learner.loss.kl`).

    Raises:
        ValueError: shapes that disagree, a mask with gaps, or a response without any token.
    """
    _check_shapes(mask_BT, kl_BT=kl_BT)
    _check_per_response(mask_BT, scores_B=scores_B)
    valid_BT = _contiguous(mask_BT)
    empty_B = ~valid_BT.any(dim=1)
    if empty_B.any():
        raise ValueError(
            f"mask_BT has no sampled token in rows {empty_B.nonzero().flatten().tolist()}: their score has no place"
        )
    penalties_BT = -kl_coef * _valid_only(kl_BT, valid_BT)
    return penalties_BT + _valid_only(scores_B[:, None], _last_token(valid_BT))


@torch.no_grad()
def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and the returns to fit values to, both [B, T].

    advantage_t = Σ_l (gamma·lam)^l · delta_{t+l} with delta_t = reward_t + gamma·V_{t+1} - V_t;
    return_t = advantage_t + V_t. Schulman et al. 2016, "High-Dimensional Continuous Control Using
    Generalized Advantage Estimation", section 3, eq. 16.

    Args:
        rewards_BT: reward for the token at t.
        values_BT: V of the state in which token t is sampled.
        bootstrap_B: V of the state after the last token; 0 (the default) for finished responses.

    Raises:
        ValueError: shapes that disagree, a mask with gaps, gamma or lam outside [0, 1].
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, allowed is 0 to 1")
    _check_shapes(mask_BT, rewards_BT=rewards_BT, values_BT=values_BT)
    valid_BT = _contiguous(mask_BT)
    values_BT = _valid_only(values_BT, valid_BT)
    next_values_BT = functional.pad(values_BT[:, 1:], (0, 1))[:, : values_BT.shape[1]]
    if bootstrap_B is not None:
        _check_per_response(mask_BT, bootstrap_B=bootstrap_B)
        next_values_BT = next_values_BT + _valid_only(bootstrap_B[:, None], _last_token(valid_BT))
    deltas_BT = _valid_only(rewards_BT, valid_BT) + gamma * next_values_BT - values_BT
    advantages_BT = torch.zeros_like(deltas_BT)
    advantage_B = deltas_BT.new_zeros(deltas_BT.shape[0])
    for t in reversed(range(deltas_BT.shape[1])):  # padding has delta 0, so it passes on 0
        advantage_B = deltas_BT[:, t] + gamma * lam * advantage_B
        advantages_BT[:, t] = advantage_B
    return advantages_BT, advantages_BT + values_BT


@torch.no_grad()
def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Shift and scale so that valid tokens have mean 0 and (population) variance 1; padding is 0.

    Give it the whole batch of an update, before it is cut into shards or minibatches. Where all
    valid tokens are equal, or there is one or none, the result is 0. Any mask will do, with gaps
    or not.

    Raises:
        ValueError: shapes that disagree.
    """
    _check_shapes(mask_BT, x_BT=x_BT)
    valid_BT = mask_BT != 0
    num_valid = valid_BT.sum().clamp(min=1)
    x64_BT = _valid_only(x_BT, valid_BT).double()
    centred_BT = _valid_only(x64_BT - x64_BT.sum() / num_valid, valid_BT)
    std = (centred_BT.square().sum() / num_valid).sqrt()
    # float64 leaves ~1e-16 of an equal batch; float32 values that differ at all leave far more.
    spread = std > 1e-12 * functional.pad(x64_BT.abs().flatten(), (0, 1)).max()
    whitened_BT = torch.where(spread, centred_BT / torch.where(spread, std, 1), 0)
    return whitened_BT.to(_wide(x_BT.dtype))


@torch.no_grad()
def group_advantages(rewards_R: Tensor, group_ids_R: Tensor, *, method: str) -> Tensor:
    """One advantage a response, its reward against that of others: [R], in the order given.

    - "grpo": (r - group mean) / group std. Shao et al. 2024, "DeepSeekMath", section 4.1.2.
    - "dr_grpo": r - group mean. Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3.
    - "rloo": r - mean of the group's others. Ahmadian et al. 2024, "Back to Basics" (RLOO).
    - "reinforce++": (r - batch mean) / batch std. Hu 2025, "REINFORCE++"; groups play no part.

    Standard deviations are sample ones (n - 1), as in TRL and verl, plus 1e-6. A group of equal
    rewards gets 0, and so does a response alone in its group: there is nothing to compare.

    Args:
        rewards_R: finite.
        group_ids_R: integers, equal for samples of one prompt; any order, any group sizes.

    Raises:
        ValueError: an unknown method, shapes that disagree, rewards that are not finite.
    """
    if method not in GROUP_METHODS:
        raise ValueError(f"method is {method!r}, allowed are {', '.join(GROUP_METHODS)}")
    _check_groups(rewards_R, group_ids_R)
    rewards64_R = rewards_R.double()
    if method == "reinforce++":
        group_ids_R = torch.zeros_like(group_ids_R)
    # A matrix product, not index_add: the same bits each time on a GPU too.
    member_RP = _members(group_ids_R).double()
    size_R = member_RP @ member_RP.sum(0)
    centred_R = rewards64_R - member_RP @ (member_RP.T @ rewards64_R) / size_R
    others_R = (size_R - 1).clamp(min=1)
    if method == "rloo":  # r - mean of others = (r - mean) · n / (n - 1)
        centred_R = centred_R * size_R / others_R
    elif method != "dr_grpo":
        variance_R = member_RP @ (member_RP.T @ centred_R.square()) / others_R
        centred_R = centred_R / (variance_R.sqrt() + _STD_FLOOR)
    return centred_R.to(_wide(rewards_R.dtype))


@torch.no_grad()
def equal_groups(rewards_R: Tensor, group_ids_R: Tensor) -> Tensor:
    """True for every response of a group whose rewards are all equal, or that has one response: bool [R].

    Such a group has no advantage, hence no gradient: DAPO drops it and samples another prompt. Yu et al. 2025,
    "DAPO", section 3.2, eq. 11 (dynamic sampling). Give it the rewards before any length penalty or KL if groups
    are to be judged by their answers alone. Equal means within 1e-6 of the largest reward's size, or of 1.

    Args:
        rewards_R: finite.
        group_ids_R: integers, equal for samples of one prompt; any order, any group sizes.

    Raises:
        ValueError: shapes that disagree, rewards that are not finite.
    """
    _check_groups(rewards_R, group_ids_R)
    member_RP = _members(group_ids_R)
    if not len(rewards_R):  # there is no largest of nothing
        return member_RP.any(1)
    rewards_R1 = rewards_R.double()[:, None]
    highest_P = rewards_R1.where(member_RP, -math.inf).amax(0)
    lowest_P = rewards_R1.where(member_RP, math.inf).amin(0)
    size_P = torch.maximum(highest_P.abs(), lowest_P.abs()).clamp(min=1)
    equal_P = highest_P - lowest_P <= _EQUAL_TOLERANCE * size_P
    return (member_RP & equal_P).any(1)


def _members(group_ids_R: Tensor) -> Tensor:
    """True where a response (row) belongs to a group (column), groups in the order of their ids."""
    return group_ids_R[:, None] == group_ids_R.unique()


def _check_groups(rewards_R: Tensor, group_ids_R: Tensor) -> None:
    if rewards_R.dim() != 1 or group_ids_R.shape != rewards_R.shape:
        raise ValueError(
            f"rewards_R has shape {tuple(rewards_R.shape)}, group_ids_R "
            f"{tuple(group_ids_R.shape)}, allowed is [R] for both"
        )
    if not rewards_R.isfinite().all():
        bad = (~rewards_R.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"rewards_R is not finite at {bad}")


def _valid_only(x: Tensor, valid: Tensor) -> Tensor:
    """x where valid, else 0, before any arithmetic: NaN * 0 is NaN."""
    return torch.where(valid, x, 0).to(_wide(x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _last_token(valid_BT: Tensor) -> Tensor:
    """True at the last sampled token of each response."""
    return valid_BT & ~functional.pad(valid_BT[:, 1:], (0, 1))[:, : valid_BT.shape[1]]


def _contiguous(mask_BT: Tensor) -> Tensor:
    """The mask as bool, refused where a sampled token follows padding."""
    valid_BT = mask_BT != 0
    gaps_B = (valid_BT[:, 1:] & ~valid_BT[:, :-1]).any(dim=1)
    if gaps_B.any():
        raise ValueError(
            f"mask_BT has a 1 after a 0 in rows {gaps_B.nonzero().flatten().tolist()}, "
            "allowed are ones contiguous from t=0"
        )
    return valid_BT


def _check_shapes(mask_BT: Tensor, **tensors: Tensor) -> None:
    if mask_BT.dim() != 2:
        raise ValueError(f"mask_BT has shape {tuple(mask_BT.shape)}, allowed is [B, T]")
    for name, tensor in tensors.items():
        if tensor.shape != mask_BT.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, mask_BT has {tuple(mask_BT.shape)}")


def _check_per_response(mask_BT: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != mask_BT.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, allowed is {tuple(mask_BT.shape[:1])}")
