"""What every response goes through, however it is collected: its request, its last checks, the end of its group."""

from __future__ import annotations

from collections.abc import Iterable

from actors.reward import Reward
from actors.rollout import RolloutRequest
from cluster import recover
from cluster.job import Job
from cluster.leases import Lease
from contracts.config import Config
from contracts.records import Rollout, ScoredRollout
from contracts.seeds import derive_seed
from learner.experience import problem_of, rewards_equal
from learner.experience_queue import ScoredGroup


def request_for(config: Config, lease: Lease, trajectory_id: str) -> RolloutRequest:
    """What a rollout actor is asked for; the seed follows from the run's and the id."""
    return RolloutRequest(
        trajectory_id=trajectory_id,
        prompt_id=lease.prompt.prompt_id,
        group_id=lease.group_id,
        prompt_tokens=lease.prompt.tokens,
        max_tokens=config.sampling.max_response_tokens,
        temperature=config.sampling.temperature,
        seed=derive_seed(config.seed, trajectory_id),
    )


async def admit(
    job: Job, lease: Lease, rollout: Rollout, reward: Reward, reference: list[float]
) -> ScoredRollout | None:
    """The scored response, or None if it cannot be trained on and is in quarantine now."""
    sample = ScoredRollout(rollout, *reward, reference)
    problem = problem_of(sample, token_budget=job.config.training.micro_batch_tokens)
    if problem is None:
        return sample
    await recover.quarantine(job, lease, rollout.trajectory_id, reason=problem, response=rollout.response_text)
    return None


async def finish_group(job: Job, lease: Lease, scored: Iterable[ScoredRollout | None]) -> None:
    """All samples of a group are back (None: in quarantine): into the queue, or given up."""
    good = tuple(sample for sample in scored if sample is not None)
    if good and job.config.algorithm.drop_equal_groups and rewards_equal(good):
        recover.drop(job, lease)
    elif good:
        await job.queue.put(ScoredGroup(lease.group_id, lease.started_version, good))
        job.leases.queued(lease)
        job.expired_in_a_row = 0
    await job.notify()
