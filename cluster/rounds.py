"""How a deterministic run collects: in rounds, each complete before the next is issued.

A round is what the batch lacks: all of its groups, and again as many as were dropped or quarantined. Its groups go to
the workers by their place, and its responses are scored in batches by id, so that the same round under the same
weights gives the same bits, also on other workers than the first time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.admission import BadRollout
from actors.reward import BadSample
from cluster import recover
from cluster.job import Job
from cluster.leases import Lease
from cluster.samples import admit, finish_group, request_for
from cluster.together import generate_together, reference_together, score_together
from contracts.records import Rollout, ScoredRollout

Sampled = list[tuple[Lease, Rollout]]


async def collect(job: Job) -> None:
    """Round after round. Waits for the version that the next batch trains at (`Job.next_round`)."""
    while True:
        leases = await job.next_round()
        scored = await _score(job, await _sample(job, leases))
        for lease in leases:
            await finish_group(job, lease, [scored.get(trajectory) for trajectory in lease.trajectory_ids])


async def _sample(job: Job, leases: Sequence[Lease]) -> Sampled:
    """The responses that came back well, in the order of their ids; the others are in quarantine."""
    groups = [[request_for(job.config, lease, trajectory) for trajectory in lease.trajectory_ids] for lease in leases]
    found = await generate_together(job.pool, job.config, groups)
    sampled: Sampled = []
    for lease in leases:
        for trajectory in lease.trajectory_ids:
            match found[trajectory]:
                case BadRollout() as bad:
                    await recover.quarantine(job, lease, trajectory, reason=str(bad))
                case rollout:
                    sampled.append((lease, rollout))
    return sampled


async def _score(job: Job, sampled: Sampled) -> dict[str, ScoredRollout | None]:
    """By trajectory id, None where it is in quarantine."""
    rollouts = [rollout for _, rollout in sampled]
    with job.scoring:
        rewards, reference = await asyncio.gather(
            score_together(
                job.rewards,
                [(lease.prompt, rollout) for lease, rollout in sampled],
                batch_size=job.config.reward_workers.max_batch_size,
            ),
            _reference(job, rollouts),
        )
    scored: dict[str, ScoredRollout | None] = {}
    for (lease, rollout), reward, logprobs in zip(sampled, rewards, reference, strict=True):
        name = rollout.trajectory_id
        if isinstance(reward, BadSample):
            await recover.quarantine(job, lease, name, reason=str(reward), response=rollout.response_text)
            scored[name] = None
        else:
            scored[name] = await admit(job, lease, rollout, reward, logprobs)
    return scored


async def _reference(job: Job, rollouts: Sequence[Rollout]) -> list[list[float]]:
    """None for each where nothing would use them."""
    if not job.config.algorithm.monitor_kl:
        return [[] for _ in rollouts]
    return await reference_together(job.reference, rollouts, batch_size=job.config.reference_workers.max_batch_size)
