"""Scored rollouts for tests: name what matters, the rest is filled in."""

from collections.abc import Sequence
from typing import Any

from contracts.records import Rollout, ScoredRollout


def scored_rollout(
    trajectory_id: str = "t0",
    *,
    prompt: Sequence[int] = (5, 6),
    response: Sequence[int] = (7, 8, 9),
    behavior: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    versions: Sequence[int] | None = None,
    reward: float = 1.0,
    group_id: str = "g0",
    **rollout: Any,
) -> ScoredRollout:
    """One scored response; log-probabilities are -1 and versions 0 where not given."""
    return ScoredRollout(
        rollout=Rollout(
            trajectory_id=trajectory_id,
            prompt_id=rollout.pop("prompt_id", "p0"),
            group_id=group_id,
            prompt_tokens=list(prompt),
            response_tokens=list(response),
            response_text=rollout.pop("response_text", "text"),
            behavior_logprobs=[-1.0] * len(response) if behavior is None else list(behavior),
            weights_versions=[0] * len(response) if versions is None else list(versions),
            finish_reason=rollout.pop("finish_reason", "stop"),
            actor_id=rollout.pop("actor_id", "actor-0"),
            **rollout,
        ),
        reward=reward,
        reward_components={"toy": reward},
        reward_version="toy-1",
        reference_logprobs=[-1.0] * len(response) if reference is None else list(reference),
    )
