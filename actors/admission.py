"""What an actor's answer must be before anything of it is scored or trained on."""

from __future__ import annotations

import math
from typing import get_args

from actors.mailbox import RolloutRequest
from contracts.records import FinishReason, Rollout


class BadRollout(ValueError):
    """An actor answered with something that cannot be its response; says which actor, and why."""


def check_rollout(
    rollout: Rollout, request: RolloutRequest, *, actor_id: str, newest_version: int, vocabulary: int
) -> None:
    """Refuse what is not an answer to `request` under weights that were published.

    A record that crossed processes was not built here, so its own checks have not run.

    Raises:
        BadRollout: names the actor, the trajectory and the reason.
    """
    problem = _problem_of(rollout, request, newest_version, vocabulary)
    if problem is not None:
        raise BadRollout(f"{actor_id} answered {request.trajectory_id} with {problem}")


def _problem_of(rollout: Rollout, request: RolloutRequest, newest_version: int, vocabulary: int) -> str | None:
    for name in ("trajectory_id", "prompt_id", "group_id", "prompt_tokens"):
        if getattr(rollout, name) != getattr(request, name):
            return f"another {name}"
    num_tokens = len(rollout.response_tokens)
    for name in ("behavior_logprobs", "weights_versions"):
        if len(getattr(rollout, name)) != num_tokens:
            return f"{len(getattr(rollout, name))} {name} for {num_tokens} response tokens"
    if num_tokens > request.max_tokens:
        return f"{num_tokens} tokens, {request.max_tokens} were allowed"
    if num_tokens and not (min(rollout.response_tokens) >= 0 and max(rollout.response_tokens) < vocabulary):
        return f"token ids outside of the vocabulary of {vocabulary}"
    if any(math.isfinite(logprob) and logprob > 0 for logprob in rollout.behavior_logprobs):
        return "a log-probability above 0"
    if num_tokens and max(rollout.weights_versions) > newest_version:
        return f"weights version {max(rollout.weights_versions)}, the newest is {newest_version}"
    if sorted(rollout.weights_versions) != list(rollout.weights_versions):
        return "weights versions that go back"
    if rollout.finish_reason not in get_args(FinishReason):
        return f"finish_reason {rollout.finish_reason!r}"
    return None
