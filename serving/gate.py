"""The gate: whether a version is good enough to follow the current one."""

from __future__ import annotations

from dataclasses import dataclass

from contracts.serving import GateConfig
from serving.records import Verdict


@dataclass(frozen=True)
class Measured:
    """One version on the fixed prompts: means over the responses."""

    reward: float
    response_tokens: float


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
