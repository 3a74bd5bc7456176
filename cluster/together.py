"""What a deterministic run asks of its workers: a round at once, divided by place, so that no bit depends on timing.

The shapes of the batches that a response is sampled and scored in decide its last bits. Here they follow from the ids
alone: from which requests a worker gets in one call, and from which responses a replica gets in one batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from actors.admission import BadRollout
from actors.pool import RolloutPool
from actors.reference import ReferenceModel
from actors.reward import BadSample, Reward, RewardComponents
from actors.rollout import RolloutRequest
from contracts.config import Config
from contracts.records import Prompt, Rollout

T = TypeVar("T")


def shares(groups: Sequence[T], num_workers: int) -> list[list[T]]:
    """Which groups of a round each worker gets: by their number in the round, never by load."""
    return [list(groups[index::num_workers]) for index in range(num_workers)]


async def generate_together(
    pool: RolloutPool, config: Config, groups: Sequence[Sequence[RolloutRequest]]
) -> dict[str, Rollout | BadRollout]:
    """The responses to the groups of a round, by trajectory id, in the order of the requests.

    Raises:
        NoAnswer: a worker did not answer, nor did those that took its place.
        RuntimeError: the pool has failed.
    """
    by_worker = [
        [request for group in share for request in group] for share in shares(groups, config.rollout.num_workers)
    ]
    answers = await asyncio.gather(
        *(
            pool.generate_together(index, requests, deadline_s=config.deadlines.lease_s)
            for index, requests in enumerate(by_worker)
            if requests
        )
    )
    asked = [request.trajectory_id for requests in by_worker for request in requests]
    found = dict(zip(asked, (answer for share in answers for answer in share), strict=True))
    return {request.trajectory_id: found[request.trajectory_id] for group in groups for request in group}


async def score_together(
    components: RewardComponents, responses: Sequence[tuple[Prompt, Rollout]], *, batch_size: int
) -> list[Reward | BadSample]:
    """Rewards in the order of the responses, one batch after the other.

    Raises:
        NoAnswer: a component did not answer in time.
    """
    rewards: list[Reward | BadSample] = []
    for batch in batches(responses, batch_size):
        rewards += await components.score_together([(prompt, rollout.response_text) for prompt, rollout in batch])
    return rewards


async def reference_together(
    reference: ReferenceModel, rollouts: Sequence[Rollout], *, batch_size: int
) -> list[list[float]]:
    """Reference log-probabilities in the order of the responses, one batch after the other.

    Raises:
        NoAnswer: the reference model did not answer in time.
    """
    logprobs: list[list[float]] = []
    for batch in batches(rollouts, batch_size):
        pairs = [(rollout.prompt_tokens, rollout.response_tokens) for rollout in batch]
        logprobs += await reference.logprobs_together(pairs)
    return logprobs


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """All of `size`, but the last may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]
