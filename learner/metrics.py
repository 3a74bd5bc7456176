"""What a step of the learner tells of itself; every number is finite, 0 where the algorithm has no such thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contracts.records import ScoredRollout
from learner.experience import Experience
from learner.normalise import RunningMoments
from learner.targets import Predictions, Targets


def batch_metrics(
    experience: Experience,
    predicted: Predictions | None,
    targets: Targets | None,
    stats: Mapping[str, Any],
    *,
    normaliser: RunningMoments,
) -> dict[str, float]:
    """Of the weights at the start of the step; without a proximal pass the one update saw them."""
    mask_BT = experience.mask_BT
    num_tokens, num_responses = int(mask_BT.sum()), len(experience)
    if predicted is None:
        kl_sum, entropy_sum = stats.get("reference_kl_sum", 0.0), stats.get("entropy_sum", 0.0)
        gap_mean, gap_max = stats.get("behavior_gap_sum", 0.0) / num_tokens, stats.get("behavior_gap_max", 0.0)
    else:
        reference_BT = experience.reference_logprobs_BT
        kl_sum = 0.0 if reference_BT is None else (predicted.logprobs_BT - reference_BT)[mask_BT].sum()
        entropy_sum = predicted.entropy_BT[mask_BT].sum()
        gap_n = (predicted.logprobs_BT - experience.behavior_logprobs_BT)[mask_BT].abs()
        gap_mean, gap_max = gap_n.mean(), gap_n.max()
    return {
        "kl_to_reference": float(kl_sum) / num_responses,
        "entropy": float(entropy_sum) / num_tokens,
        "explained_variance": _explained_variance(targets, mask_BT),
        "response_tokens_mean": num_tokens / num_responses,
        "truncated_fraction": float(experience.truncated_B.float().mean()),
        "masked_token_fraction": 1 - int(experience.trained_BT.sum()) / num_tokens,
        "behavior_logprob_gap_mean": float(gap_mean),
        "behavior_logprob_gap_max": float(gap_max),
        "return_std": normaliser.standardisation()[1],
    }


def update_metrics(stats: Mapping[str, Any]) -> dict[str, float]:
    """Of the updates; sums are over their tokens."""
    tokens = max(stats.get("tokens", 0.0), 1.0)
    updates = max(stats["minibatches"] - stats["skipped_minibatches"], 1.0)
    return {
        "policy_loss": stats.get("policy_loss", 0.0) / updates,
        "value_loss": stats.get("value_loss", 0.0) / updates,
        "kl_loss": stats.get("kl_loss", 0.0) / updates,
        "clip_fraction": stats.get("clipped_tokens", 0.0) / tokens,
        "approx_kl": stats.get("approx_kl_sum", 0.0) / tokens,
        "ratio_max": stats.get("ratio_max", 0.0),
        "truncated_weight_fraction": stats.get("truncated_weights", 0.0) / tokens,
        "grad_norm": stats.get("grad_norm_sum", 0.0) / updates,
        "skipped_minibatches": stats["skipped_minibatches"],
    }


def lag_metrics(batch: Sequence[ScoredRollout], training_version: int, *, oldest_version: int = 0) -> dict[str, float]:
    """Of the oldest token of each response that is in the loss, which those before `oldest_version` are not."""
    versions = [[each for each in sample.rollout.weights_versions if each >= oldest_version] for sample in batch]
    lags = [training_version - min(each, default=training_version) for each in versions]
    return {"lag_steps_max": float(max(lags)), "lag_steps_mean": sum(lags) / len(lags)}


def _explained_variance(targets: Targets | None, mask_BT: Any) -> float:
    if targets is None or targets.returns_BT is None or targets.values_BT is None:
        return 0.0
    returns = targets.returns_BT[mask_BT].double()  # the square of a large score overflows float32
    variance = returns.var(correction=0)
    errors = returns - targets.values_BT[mask_BT]
    return float(1 - errors.var(correction=0) / variance) if variance > 0 else 0.0
