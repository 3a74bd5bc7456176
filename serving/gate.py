"""The gate: whether a version is good enough to follow the current one, decided from what both have sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from contracts.serving import GateConfig
from serving.records import Verdict


@dataclass(frozen=True)
class Sampled:
    """One version on the fixed prompts, a response each, in the order of the prompts.

    `logprobs` are those of the response's tokens under this version, in nats, at temperature 1. `rewards` has each
    component's score by name, or why the response cannot be scored.
    """

    version: int
    responses: list[list[int]]
    logprobs: list[list[float]]
    rewards: list[dict[str, float] | str]


@dataclass(frozen=True)
class Measured:
    """One version on the fixed prompts: means over the responses."""

    reward: float
    response_tokens: float


def kl_k3(logprobs: Sequence[float], other_logprobs: Sequence[float]) -> float:
    """KL(sampled || other) in nats a response, estimated from one response: never negative, 0 for equal versions.

    The sum over its tokens of r - 1 - log r, r = other / sampled probability ("k3", Schulman 2020, "Approximating KL
    Divergence"): its mean is the KL, its variance below that of the log-ratio. Infinite where the other version gives
    a token no probability.

    Args:
        logprobs: of the response's tokens, under the version that sampled them.
        other_logprobs: of the same tokens, under the other one.
    """
    log_ratio = np.asarray(other_logprobs, np.float64) - np.asarray(logprobs, np.float64)
    with np.errstate(over="ignore"):
        return float(np.sum(np.expm1(log_ratio) - log_ratio))


def compare(
    current: Sampled,
    candidate: Sampled,
    under_candidate: Sequence[Sequence[float]],
    weights: Mapping[str, float],
    limits: GateConfig,
) -> Verdict:
    """Whether the candidate may follow the current version.

    Prompts on which the current version's response cannot be scored say nothing of the candidate and are left out of
    the rewards. A candidate whose response cannot be scored where the current one's can is refused.

    Args:
        under_candidate: log-probabilities of the current version's responses under the candidate, in nats.
        weights: of each component of the reward.

    Raises:
        ValueError: no response of the current version can be scored, so that there is nothing to compare with.
    """
    scored = zip(current.rewards, candidate.rewards, strict=True)
    known = [(before, after) for before, after in scored if not isinstance(before, str)]
    if not known:
        raise ValueError(f"no response of version {current.version} can be scored; the first: {current.rewards[0]}")
    lost = [after for _, after in known if isinstance(after, str)]
    pairs = [(before, after) for before, after in known if not isinstance(after, str)]
    measured_before = _measured(current, [before for before, _ in pairs], weights)
    measured_after = _measured(candidate, [after for _, after in pairs], weights)
    divergences = [kl_k3(*each) for each in zip(current.logprobs, under_candidate, strict=True)]
    kl = sum(divergences) / len(divergences)
    verdict = decide(measured_before, measured_after, kl, limits)
    metrics = verdict.metrics | {"prompts": float(len(pairs))}
    for name in weights:
        metrics[f"reward/{name}"] = _mean([after[name] for _, after in pairs])
        metrics[f"reward_current/{name}"] = _mean([before[name] for before, _ in pairs])
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no others
    if lost:
        reason = f"{len(lost)} of {len(known)} responses cannot be scored; the first: {lost[0]}"
        return Verdict(False, f"{reason}; {verdict.reason}" if pairs and not verdict.promote else reason, finite)
    return replace(verdict, metrics=finite)


def _measured(sampled: Sampled, rewards: Sequence[Mapping[str, float]], weights: Mapping[str, float]) -> Measured:
    reward = _mean([sum(weight * each[name] for name, weight in weights.items()) for each in rewards])
    return Measured(reward, _mean([len(response) for response in sampled.responses]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def decide(current: Measured, candidate: Measured, kl: float, limits: GateConfig) -> Verdict:
    """Whether the candidate is no worse than the limits allow, and why not.

    Args:
        kl: KL(current || candidate) in nats a response, estimated from the current version's samples.
    """
    reasons = []
    # Asked so that a value that is no number refuses.
    if not candidate.reward >= current.reward - limits.max_reward_drop:
        reasons.append(
            f"reward {candidate.reward:.4g}, {current.reward:.4g} before (max_reward_drop {limits.max_reward_drop:g})"
        )
    if not kl <= limits.max_kl:
        reasons.append(f"{kl:.4g} nats a response from the current version (max_kl {limits.max_kl:g})")
    shorter, longer = sorted((max(current.response_tokens, 1.0), max(candidate.response_tokens, 1.0)))
    if not longer <= shorter * limits.max_length_ratio:
        reasons.append(
            f"{candidate.response_tokens:.4g} tokens a response, {current.response_tokens:.4g} before "
            f"(max_length_ratio {limits.max_length_ratio:g})"
        )
    metrics = {
        "reward": candidate.reward,
        "reward_current": current.reward,
        "kl": kl,
        "response_tokens": candidate.response_tokens,
        "response_tokens_current": current.response_tokens,
    }
    return Verdict(not reasons, "; ".join(reasons) or "within the limits of the gate", metrics)
