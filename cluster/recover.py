"""What a run does when something goes wrong, and the checkpoints that let it go on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors import replicas
from actors.worker import WorkerLost
from cluster.evaluate import Evaluation, from_record, record
from cluster.job import Job
from cluster.leases import Lease
from cluster.run_log import write_json
from contracts.clock import now
from contracts.disk import DiskFull, is_full, room
from contracts.events import Event
from contracts.records import SCHEMA_VERSION, ScoredRollout, experience_table
from contracts.waiting import NoAnswer
from learner import checkpoint as checkpoints

_MIN_BAD = 4  # a share says nothing about a handful
_LOOK_AGAIN_S = 5.0  # whether the disk has room
_MAX_DROPPED_BATCHES = 20  # of groups without variance in a row


class TooManyBad(RuntimeError):
    """A larger share of trajectories than allowed could not be scored."""


async def lease_failed(job: Job, lease: Lease, errors: Sequence[BaseException]) -> None:
    """Decide about a group of which not every sample came back.

    A dead worker's group is sent again; an overdue one is expired and its prompt issued anew. Anything else, and
    either of the two too often, ends the run with the first error.
    """
    for error in errors:
        if not isinstance(error, (WorkerLost, NoAnswer)):
            raise error
    limit = job.config.streaming.max_attempts
    overdue = [error for error in errors if isinstance(error, NoAnswer)]
    if overdue:
        job.expired_in_a_row += 1
        if job.expired_in_a_row > limit:
            raise RuntimeError(f"{job.expired_in_a_row} prompt groups in a row expired; the last: {overdue[0]}")
        job.leases.expire(lease)
        job.pending.append(lease.prompt)
        job.progress.warn(f"{lease.group_id} expired and is issued again: {overdue[0]}")
        who = f"{lease.group_id} of {lease.actor_id}"
        job.log.event(Event("expiry", who, str(overdue[0]), "its prompt is issued again under new ids"))
        await job.notify()
    elif lease.attempt >= limit:
        raise RuntimeError(f"{lease.group_id} lost its worker {lease.attempt} times; the last: {errors[0]}")


async def watch_replicas(job: Job) -> None:
    """Log the deaths and restarts of replicas; end the run when those of a component keep failing to start."""
    components = (*job.rewards.handles, *job.judges.handles)
    applications = {handle.application: f"reward component {handle.config.name}" for handle in components}

    def changed(event: Event) -> None:
        job.log.event(event)
        job.progress.note(f"{event.who}: {event.cause if event.event == 'death' else event.consequence}")

    await replicas.watch(
        applications | {job.reference.application: "the reference model"},
        on_event=changed,
        deadline_s=job.config.deadlines.score_s,
    )


async def quarantine(job: Job, lease: Lease, trajectory_id: str, *, reason: str, response: str = "") -> None:
    """Keep a trajectory that cannot be trained on in quarantine.jsonl; the step goes on without it."""
    job.leases.quarantine(lease)
    job.bad_reasons.append(reason)
    job.log.quarantine(
        step=job.version + 1,
        trajectory_id=trajectory_id,
        prompt_id=lease.prompt.prompt_id,
        reason=reason,
        response=response,
    )
    if len(job.bad_reasons) == 1:
        job.progress.warn(f"quarantined {trajectory_id}: {reason}")
    stop_if_too_many_bad(job, job.config.training.batch_size)
    await job.notify()


def stop_if_too_many_bad(job: Job, good: int) -> None:
    """Raise TooManyBad if the quarantined share since the last batch exceeds `streaming.max_bad_fraction`."""
    bad, allowed = len(job.bad_reasons), job.config.streaming.max_bad_fraction
    if bad >= _MIN_BAD and bad > allowed * (bad + good):
        raise TooManyBad(
            f"{bad} of {bad + good} trajectories of step {job.version + 1} could not be scored "
            f"(streaming.max_bad_fraction {allowed:g}); the last: {job.bad_reasons[-1]}; "
            f"all are in {job.log.run_dir / 'quarantine.jsonl'}"
        )


def drop(job: Job, lease: Lease) -> None:
    """Give up a group whose rewards are all equal; another prompt is sampled instead.

    Raises:
        TooManyBad: nothing but such groups came since the last batch.
    """
    job.leases.drop(lease)
    job.dropped_in_a_row += 1
    if job.dropped_in_a_row > _MAX_DROPPED_BATCHES * job.bound.groups_per_batch:
        raise TooManyBad(
            f"{job.dropped_in_a_row} groups were dropped for step {job.version + 1} because all their rewards were "
            "equal (algorithm.drop_equal_groups): the reward does not tell this policy's responses apart"
        )


def standing(job: Job, step: int) -> dict[str, Any]:
    """Where the run stands with the batch of `step` chosen and no other: what a resumed run goes on from, as JSON.

    Queued and running groups are in it as expired, and their prompts as the next to be issued.
    """
    queued = job.queue.groups
    leases = job.leases.state()
    leases["counts"]["expired"] += sum(len(group.samples) for group in queued)
    prompts = [group.samples[0].rollout.prompt_id for group in queued]
    return {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        **job.provenance,
        "prompts": job.prompts.state(),
        "leases": leases,
        "open_prompts": [*prompts, *(prompt.prompt_id for prompt in (*job.leases.open_prompts, *job.pending))],
    }


async def train(job: Job, samples: list[ScoredRollout]) -> dict[str, float]:
    """One step of the learner. Where it gives up, the error says which checkpoint is the last good one."""
    try:
        return await job.learner.step(samples, training_version=job.version)
    except ArithmeticError as error:
        last = job.last_checkpoint
        where = f"the last good checkpoint is {last.path}" if last else "there is no checkpoint yet"
        raise ArithmeticError(f"{str(error).strip().splitlines()[-1]}; {where}") from error


async def written(job: Job, what: str, write: Callable[[], None]) -> None:
    """Call `write` until the disk has room for `what`, saying so meanwhile: nothing is trained that is not logged.

    Raises:
        DiskFull: nobody made room within `deadlines.disk_s`, or before the run was asked to stop.
    """
    began, said = now(), False
    while True:
        try:
            return write()
        except OSError as error:
            if not is_full(error):
                raise
            waited_s, disk_s = now() - began, job.config.deadlines.disk_s
            wanted = f"no room for {what}: {room(job.config.output_dir)}"
            if waited_s > disk_s or job.stopping.is_set():
                why = "the run was asked to stop" if job.stopping.is_set() else f"deadlines.disk_s {disk_s:g}"
                again = "none of it is lost: make room and continue with resume=true"
                raise DiskFull(f"{wanted}; waited {waited_s:.0f} s ({why}); {again}") from error
        if not said:
            job.progress.warn(f"{wanted}; waiting for up to {disk_s:g} s")
            job.log.event(Event("disk_full", "the run", wanted, f"waits for room, {disk_s:g} s at most"))
            said = True
        job.progress.waiting(f"room on the disk, since {waited_s:.0f} s: {wanted}")
        await asyncio.sleep(min(_LOOK_AGAIN_S, disk_s / 4))


async def checkpoint_or_later(job: Job, *, cause: str = "") -> None:
    """A checkpoint; where the disk has no room for it, the run goes on and it is tried again after the next step."""
    try:
        await checkpoint(job, cause=cause)
    except DiskFull as full:
        if not job.checkpoint_overdue:
            last = f"{job.last_checkpoint.path.name} stays the newest" if job.last_checkpoint else "there is none yet"
            consequence = f"{last}; the run goes on and tries again after each step"
            job.progress.warn(f"{full}; {consequence}")
            job.log.event(Event("disk_full", "the learner", str(full), consequence))
        job.checkpoint_overdue = True


async def checkpoint(job: Job, *, cause: str = "") -> None:
    """Write a checkpoint of the published version; nothing counts before its manifest is written.

    Raises:
        DiskFull: there is no room. Nothing of it is left, and older ones stay.
    """
    step, run_dir, began = job.version, job.config.output_dir, now()
    job.progress.waiting(f"checkpoint of step {step}")
    folder = checkpoints.folder_of(run_dir, step)
    needed_bytes = checkpoints.size_bytes(job.last_checkpoint) if job.last_checkpoint else None
    try:
        if needed_bytes is not None and shutil.disk_usage(run_dir).free < needed_bytes:
            raise DiskFull("it would not fit")  # known before gigabytes are written
        await _write_checkpoint(job, step)
    except OSError as error:
        checkpoints.discard(folder)
        if not is_full(error):
            raise
        raise DiskFull(
            f"no room for the checkpoint of step {step}: {room(run_dir, needed_bytes=needed_bytes)}"
        ) from error
    finally:
        job.progress.waiting("")
    every = job.config.checkpoint.every_steps
    cause = cause or (f"every {every} steps" if step % every == 0 else "the run ends")
    cause = "there was no room for it before" if job.checkpoint_overdue else cause
    job.checkpoint_overdue = False
    consequence = f"{folder.stem} is whole, written in {now() - began:.1f} s"
    job.log.event(Event("checkpoint", "the learner", cause, consequence))


async def _write_checkpoint(job: Job, step: int) -> None:
    folder = checkpoints.begin(job.config.output_dir, step)
    groups = job.queue.groups
    state = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "prompts": job.prompts.state(),
        "leases": job.leases.state(),
        "open_prompts": [prompt.prompt_id for prompt in (*job.leases.open_prompts, *job.pending)],
        "queued": {group.group_id: group.started_version for group in groups},
    }
    if job.config.deterministic:  # what has begun since is done again under the same ids, it does not expire
        state |= {name: job.standing[name] for name in ("prompts", "leases", "open_prompts")} | {"queued": {}}
        groups = ()
    write_json(folder / "state" / "run.json", state)
    samples = [sample for group in groups for sample in group.samples]
    pq.write_table(experience_table(samples), folder / "state" / "queue.parquet")
    await job.learner.save(folder.resolve())
    job.last_checkpoint = checkpoints.finish(folder, step, keep=job.config.checkpoint.keep)
    job.learner.checkpointed(step, job.last_checkpoint.state.resolve())


async def evaluation_before(job: Job, evaluate: Callable[[Job], Awaitable[Evaluation]]) -> Evaluation:
    """The evaluation of the initial policy: measured now, or read back on resume."""
    path = job.config.output_dir / "evaluation_before.json"
    saved = _saved_evaluation(path) if job.resumption is not None else None
    if saved is None:
        saved = await evaluate(job)
        write_json(path, record(saved))
    return saved


def _saved_evaluation(path: Path) -> Evaluation | None:
    return from_record(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
