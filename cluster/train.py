"""The main loop: read it top to bottom.

`run` prepares, trains and reports. Training is two coroutines that meet at a bounded queue:

    collect   prompts -> rollouts -> scores -> queue       as far ahead as the staleness bound allows
    learn     queue -> experience log -> one PPO update -> publish

`publish` hands the new weights to the pool, which brings every rollout engine to them by itself while the next batch
forms. With `max_lag_steps: 0` the bound lets `collect` start nothing but on the newest weights, which makes the same
loop strictly on-policy.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from actors.admission import BadRollout
from actors.reward import BadSample
from actors.worker import Worker
from cluster import nodes, recover, resume, reward_rollout, rounds, watch
from cluster.application import Application
from cluster.evaluate import compare, evaluate
from cluster.job import Job
from cluster.leases import Lease
from cluster.metrics import StepClock, reward_metrics
from cluster.preflight import Preflight
from cluster.prepare import prepare
from cluster.progress import Progress
from cluster.report import evaluation_table, write_report
from cluster.run_log import write_json
from cluster.samples import admit, finish_group, request_for
from contracts.clock import now
from contracts.config import Config
from contracts.events import Event
from contracts.records import ScoredRollout
from contracts.stopping import StopRequest
from contracts.waiting import NoAnswer
from learner.experience_queue import ScoredGroup

_LOOK_AGAIN_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """How far a run came; `finished` is False when it was asked to stop before it had evaluated the last step."""

    step: int
    finished: bool


async def run(
    config: Config,
    preflight: Preflight,
    progress: Progress,
    stopping: StopRequest,
    served: Application | None = None,
) -> Outcome:
    """Prepare, evaluate, train, evaluate again, report. While it trains, `stopping` ends it early with a checkpoint.

    With `served` it starts that application before the first step; see `cluster.outliving` for what becomes of it.
    """
    async with AsyncExitStack() as stack:
        job = await prepare(config, preflight, progress, stopping, stack, served)
        await resume.catch_up(job, publish)
        before = await recover.evaluation_before(job, evaluate)
        name, batch_size = config.algorithm.name.upper(), config.training.batch_size
        progress.phase(f"Training with {name}: {config.steps} steps of {batch_size} responses")
        stopping.graceful = True
        async with asyncio.TaskGroup() as tasks:
            watching = [
                raise_pool_failure(job),
                recover.watch_replicas(job),
                nodes.watch(job),
                reward_rollout.watch(job),
            ]
            if job.scaling is not None:
                watching.append(job.scaling.watch())
            background = [tasks.create_task(work) for work in (collect(job), *watching)]
            clock = StepClock(job)
            while job.version < config.steps and not stopping.is_set() and not job.alarmed:
                if job.loop is not None and await job.loop.next_round(job):
                    clock = StepClock(job)  # the round's time is no step's
                await learn(job, clock)
                await nodes.make_way(job)
            for task in background:
                task.cancel()
        if job.last_checkpoint is None or job.last_checkpoint.step != job.version:
            await recover.checkpoint(job)
        rolled_back = await watch.roll_back_if_asked(job)
        stopping.graceful = False
        finished = (job.version == config.steps or job.alarmed) and not stopping.is_set()
        if finished and not rolled_back:
            after = await evaluate(job)
            if job.loop is not None:
                await job.loop.finish(job, after)
            comparison = compare(before, after, shown_samples=config.evaluation.shown_samples)
            write_json(config.output_dir / "evaluation.json", comparison)
            progress.result(evaluation_table(comparison))
        progress.note(f"report: {write_report(config.output_dir)}")
        return Outcome(job.version, finished)


async def collect(job: Job) -> None:
    """Keep the rollout actors full, one task a prompt group. `Job.next_lease` waits for room and freshness.

    A deterministic run collects in rounds, because timing decides nothing there.
    """
    if job.config.deterministic:
        await rounds.collect(job)
    async with asyncio.TaskGroup() as groups:
        while True:
            lease, worker = await job.next_lease()
            groups.create_task(collect_group(job, lease, worker))


async def collect_group(job: Job, lease: Lease, worker: Worker) -> None:
    """Sample and score one group. Its lease ends in the queue, in quarantine, or expired and issued anew."""
    scored: dict[str, ScoredRollout | None] = {}
    while True:
        missing = [trajectory for trajectory in lease.trajectory_ids if trajectory not in scored]
        outcomes = await asyncio.gather(
            *(collect_sample(job, lease, worker, trajectory) for trajectory in missing), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        scored |= {
            trajectory: outcome
            for trajectory, outcome in zip(missing, outcomes, strict=True)
            if not isinstance(outcome, BaseException)
        }
        if not errors:
            break
        await recover.lease_failed(job, lease, errors)
        if any(isinstance(error, NoAnswer) for error in errors):
            return
        lease, worker = await job.another_worker(lease, len(errors))
    await finish_group(job, lease, scored.values())


async def collect_sample(job: Job, lease: Lease, worker: Worker, trajectory_id: str) -> ScoredRollout | None:
    """One response, scored as soon as it is finished; None if it had to be quarantined."""
    request = request_for(job.config, lease, trajectory_id)
    try:
        rollout = await job.pool.generate(worker, request, deadline_s=job.config.deadlines.lease_s)
    except BadRollout as bad:
        await recover.quarantine(job, lease, trajectory_id, reason=str(bad))
        return None
    if not job.sampled:
        job.sampled = True
        job.log.event(Event("phase", rollout.actor_id, "", "The first training response"))
    await job.notify()
    try:
        with job.scoring:
            reward, reference = await asyncio.gather(
                job.rewards.score(lease.prompt, rollout.response_text), job.reference_logprobs(rollout)
            )
    except BadSample as bad:
        await recover.quarantine(job, lease, trajectory_id, reason=str(bad), response=rollout.response_text)
        return None
    return await admit(job, lease, rollout, reward, reference)


async def learn(job: Job, clock: StepClock) -> None:
    """One step: a batch as fresh as the bound demands, into the log, one PPO update, new weights out."""
    batch = await next_batch(job)
    if batch is None:
        return
    clock.waited()
    samples = [sample for group in batch for sample in group.samples]
    recover.stop_if_too_many_bad(job, len(samples))
    job.bad_reasons.clear()
    job.dropped_in_a_row = 0
    job.leases.trained(batch)  # nothing is awaited before the log has it, or its `state` is taken
    step = job.version + 1
    state = job.standing = recover.standing(job, step)
    await recover.written(job, f"the batch of step {step}", lambda: job.log.experience(step, samples, state))
    await job.notify()
    job.progress.waiting(f"the learner: step {job.version + 1}")
    trained = await recover.train(job, samples)
    clock.learned()
    sent = await publish(job, job.version + 1)
    seen = watch.look(job, samples)
    row = clock.row(samples) | reward_metrics(samples) | seen.row | trained | sent | job.pool.take_delivery_costs()
    await recover.written(job, f"the metrics of step {step}", lambda: job.log.metrics(row))
    job.progress.step(row)
    if job.scaling is not None:
        job.scaling.step(row)
    await watch.act(job, seen, samples)
    if job.checkpoint_overdue or job.version % job.config.checkpoint.every_steps == 0:
        await recover.checkpoint_or_later(job)


async def next_batch(job: Job) -> list[ScoredGroup] | None:
    """Wait for a batch that leaves no response behind to grow too old; None once the run is asked to stop.

    What unblocks it: a scored group, an expired lease, `stopping`.
    """
    while not job.stopping.is_set():
        batch = job.queue.ready(job.leases.running(), training_version=job.version)
        if batch is not None:
            await job.queue.remove(batch)
            job.choosing = job.version + 1
            await job.notify()
            return batch
        wanted = job.bound.groups_per_batch
        job.progress.waiting(f"rollouts and scores: {min(len(job.queue), wanted)} of {wanted} groups")
        await job.queue.wait_changed(_LOOK_AGAIN_S)
        await job.offer_places()  # one may have become free of which nobody tells: an evaluation's, say
    return None


async def publish(job: Job, version: int) -> dict[str, Any]:
    """Weights of `version` out to serving and the rollout engines; groups may start at it as soon as one has it."""
    began = now()
    job.progress.waiting(f"the learner to publish version {version}")
    update, payload = await job.learner.publish(version)
    job.pool.publish(update, payload)
    if job.serving is not None:
        job.serving.publish((update, payload))
    job.version = job.choosing = version
    await job.notify()
    return {
        "broadcast_bytes": update.num_bytes,
        "broadcast_bytes_dense": update.dense_bytes,
        "publish_s": now() - began,
        "weights_digest": update.digest,
    }


async def raise_pool_failure(job: Job) -> None:
    """End the run when rollout actors keep dying; waits for as long as they do not."""
    await asyncio.shield(job.pool.failure)
