"""What the epochs of a step hold fixed: proximal log-probabilities, advantages and returns. Torch only.

B responses, T response tokens, U = T + 1. Computed from the whole batch before it is cut, so that neither the cut nor
the number of ranks changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from contracts.algorithm import AlgorithmConfig
from learner.advantage import gae, group_advantages, overlong_penalty, shape_rewards, whiten
from learner.experience import Experience
from learner.loss import effective_behavior, kl
from learner.normalise import RunningMoments, normalise

REWARD_CLIP = 10.0  # standard deviations


class Predictions(NamedTuple):
    """The weights at the start of the step on the whole batch: `values_BU` has the state behind the last token too."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    values_BU: Tensor


@dataclass(frozen=True)
class Targets:
    """All [B, T]. `proximal_logprobs_BT` is None where the one update of the step is itself the proximal pass."""

    advantages_BT: Tensor
    behavior_logprobs_BT: Tensor
    proximal_logprobs_BT: Tensor | None = None
    values_BT: Tensor | None = None
    returns_BT: Tensor | None = None


def needs_predictions(config: AlgorithmConfig, *, num_updates: int) -> bool:
    """Whether a step must score its batch before its first update."""
    kl_in_reward = config.kl_coef > 0 and not config.kl_in_loss
    return config.has_critic or kl_in_reward or num_updates > 1 or config.behavior_weight_level == "sequence"


def shaped_scores(
    experience: Experience, config: AlgorithmConfig, *, max_response_tokens: int, moments: RunningMoments
) -> Tensor:
    """Scores [B] after running normalisation and the overlong penalty; `moments` takes the batch in first."""
    scores_B = experience.scores_B
    if config.normalise_rewards:
        moments.update(scores_B)
        # Not shifted: the sign of a reward says something, and a baseline takes the mean away anyhow.
        scores_B = normalise(scores_B, moments, clip=REWARD_CLIP, shift=False)
    if config.overlong_buffer_tokens is not None:
        lengths_B = experience.mask_BT.sum(dim=1)
        scores_B = scores_B + overlong_penalty(
            lengths_B,
            max_tokens=max_response_tokens,
            buffer_tokens=min(config.overlong_buffer_tokens, max_response_tokens),
            penalty=config.overlong_penalty,
        )
    return scores_B


def critic_targets(
    experience: Experience, predicted: Predictions, scores_B: Tensor, config: AlgorithmConfig, *, kl_coef: float
) -> Targets:
    """GAE on shaped rewards, advantages whitened over the batch."""
    mask_BT = experience.mask_BT
    values_BT = predicted.values_BU[:, :-1]
    lengths_B = mask_BT.sum(dim=1)
    last_values_B = predicted.values_BU.gather(1, lengths_B[:, None]).squeeze(1)
    bootstrapped_B = experience.truncated_B & (config.truncation == "bootstrap")
    # Never a score and a bootstrap value for one response: that counts its future twice.
    rewards_BT = shape_rewards(
        scores_B.masked_fill(bootstrapped_B, 0.0),
        _kl_to_reference(experience, predicted),
        mask_BT,
        kl_coef=0.0 if config.kl_in_loss else kl_coef,
    )
    advantages_BT, returns_BT = gae(
        rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam, bootstrap_B=last_values_B * bootstrapped_B
    )
    return Targets(
        advantages_BT=whiten(advantages_BT, mask_BT),
        behavior_logprobs_BT=_behavior(experience, predicted.logprobs_BT, config),
        proximal_logprobs_BT=predicted.logprobs_BT,
        values_BT=values_BT,
        returns_BT=returns_BT,
    )


def group_targets(
    experience: Experience, predicted: Predictions | None, scores_B: Tensor, config: AlgorithmConfig, *, kl_coef: float
) -> Targets:
    """One advantage a response, the same at each of its tokens; KL in the reward is summed over the response."""
    mask_BT = experience.mask_BT
    if predicted is not None and not config.kl_in_loss:
        kl_BT = _kl_to_reference(experience, predicted)
        scores_B = scores_B - kl_coef * torch.where(mask_BT, kl_BT, 0).sum(dim=1)
    advantages_B = group_advantages(scores_B, experience.groups_B, method=config.name)
    behavior_BT = experience.behavior_logprobs_BT
    if predicted is not None:
        behavior_BT = _behavior(experience, predicted.logprobs_BT, config)
    return Targets(
        advantages_BT=advantages_B[:, None] * mask_BT,
        behavior_logprobs_BT=behavior_BT,
        proximal_logprobs_BT=None if predicted is None else predicted.logprobs_BT,
    )


def _kl_to_reference(experience: Experience, predicted: Predictions) -> Tensor:
    """k1 [B, T]; 0 where the run has no use for the reference, whose weight in the reward is 0 then."""
    reference_BT = experience.reference_logprobs_BT
    proximal_BT = predicted.logprobs_BT
    return torch.zeros_like(proximal_BT) if reference_BT is None else kl(proximal_BT, reference_BT, estimator="k1")


def _behavior(experience: Experience, proximal_BT: Tensor, config: AlgorithmConfig) -> Tensor:
    return effective_behavior(
        proximal_BT, experience.behavior_logprobs_BT, experience.mask_BT, level=config.behavior_weight_level
    )
