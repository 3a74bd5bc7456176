"""What an alarm leads to: an event, tasks for people, the end of the run, the policy of before."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from cluster import experience_log
from cluster.run_log import write_json
from cluster.watch.watching import NOTHING, Alarm, Seen
from contracts.events import Event, first_line
from contracts.records import SCHEMA_VERSION, Prompt, Rollout, ScoredRollout
from contracts.watch import WatchConfig
from feedback.store import Store
from feedback.store.records import Refused
from learner import checkpoint as checkpoints
from models.latent import FILE

if TYPE_CHECKING:
    from cluster.job import Job

TASK_PRIORITY = 10  # before what was queued without a suspicion


def look(job: Job, samples: Sequence[ScoredRollout]) -> Seen:
    """What the batch of the newest step shows, for the row of metrics and for `act`."""
    return job.watch.step(job.version, samples) if job.watch is not None else NOTHING


async def look_back(job: Job, last_step: int) -> None:
    """On resume: the batches of the steps up to `last_step` again, so that window and alarms are what they were."""
    if job.watch is None:
        return
    for step in range(1, last_step + 1):
        try:
            samples = await asyncio.to_thread(job.log.logged, step)
        except ValueError as error:
            job.progress.warn(f"the watch does not know step {step}: {error}")
            continue
        job.watch.step(step, samples)


async def act(job: Job, seen: Seen, samples: Sequence[ScoredRollout]) -> None:
    """Tell of what was raised and cleared, queue tasks, and mark the run as ended where the rule says so."""
    if job.watch is None:
        return
    config = job.watch.config
    if seen.latent_unknown:
        who = ", ".join(sorted(job.watch.learned))
        job.progress.note(f"no alarm `latent`: {who} came without {FILE}; a reward model trained anew has it")
    for name in seen.cleared:
        job.progress.note(f"alarm cleared: {name}")
        job.log.event(Event("alarm_cleared", name, "it is near the reference window again", "none"))
    for alarm in seen.raised:
        consequence = {"warn": "the run goes on", "stop": "the run ends"}.get(config.on_alarm, "the run is rolled back")
        job.progress.warn(f"alarm: {sentence(alarm)}; {consequence}")
        job.log.event(Event("alarm", alarm.name, sentence(alarm), consequence))
        if config.feedback_store is not None and alarm.suspicious:
            await _queue(job, alarm, samples, config)
        if config.on_alarm != "warn" and job.watch.ended is None:
            job.watch.ended = alarm


def sentence(alarm: Alarm) -> str:
    since = "" if alarm.onset == alarm.step else f" since step {alarm.onset}"
    return (
        f"{alarm.name} is {alarm.value:.3g} in step {alarm.step}, {alarm.drift:.1f} standard deviations from the "
        f"{alarm.usual:.3g} of the first steps{since}"
    )


async def _queue(job: Job, alarm: Alarm, samples: Sequence[ScoredRollout], config: WatchConfig) -> None:
    """Suspicious responses as tasks for people. A store that cannot be written does not hold the training up."""
    prompts = job.prompts.by_id({samples[at].rollout.prompt_id for at in alarm.suspicious})
    try:
        queued = await asyncio.to_thread(
            queue_tasks, str(config.feedback_store), alarm, samples, prompts, votes=config.votes_per_task
        )
    except (Refused, SQLAlchemyError, OSError) as error:
        job.progress.warn(f"suspicious responses were not queued: {first_line(error)}")
        consequence = f"suspicious responses of {alarm.name} are not queued"
        job.log.event(Event("refusal", "the feedback store", first_line(error), consequence))
        return
    job.log.event(
        Event("asked", alarm.name, sentence(alarm), f"{queued} tasks with suspicious responses wait for votes")
    )


def queue_tasks(
    place: str, alarm: Alarm, samples: Sequence[ScoredRollout], prompts: dict[str, Prompt], *, votes: int
) -> int:
    """Each suspicious response against the least suspicious one to the same prompt, or by itself; the number of tasks.

    A pair is asked once, and a response that is no text (a policy may write a NUL) not at all.

    Raises:
        Refused: the store does not take them.
    """
    asked: set[frozenset[int]] = set()
    with Store(place) as store:
        for at in alarm.suspicious:
            sides = [at, *_least_suspicious_other(at, alarm, samples)]
            if frozenset(sides) in asked:
                continue
            try:
                _add_task(store, [samples[side].rollout for side in sides], prompts, votes=votes)
            except Refused as refused:
                if refused.code != "bad_text":
                    raise
            else:
                asked.add(frozenset(sides))
    return len(asked)


def _least_suspicious_other(at: int, alarm: Alarm, samples: Sequence[ScoredRollout]) -> list[int]:
    """Another response to the same prompt with another text; none where there is none."""
    rank = {suspicious: number for number, suspicious in enumerate(alarm.suspicious)}
    mine = samples[at].rollout
    others = [
        other
        for other, sample in enumerate(samples)
        if sample.rollout.group_id == mine.group_id
        and sample.rollout.response_text.strip() != mine.response_text.strip()
    ]
    return [max(others, key=lambda other: rank.get(other, len(samples)))] if others else []


def _add_task(store: Store, rollouts: Sequence[Rollout], prompts: dict[str, Prompt], *, votes: int) -> None:
    prompt = prompts[rollouts[0].prompt_id]
    prompt_id = store.add_prompt(
        prompt.text, name=prompt.prompt_id, domain=prompt.domain, messages=list(prompt.messages)
    )
    ids = [
        store.add_response(prompt_id, rollout.response_text, source="live", weights_version=rollout.oldest_version)
        for rollout in rollouts
    ]
    store.add_task("pair" if len(ids) == 2 else "label", *ids, required_votes=votes, priority=TASK_PRIORITY)


async def roll_back_if_asked(job: Job) -> bool:
    """At the end of a run that an alarm has ended; whether it was rolled back."""
    if job.watch is None or job.watch.ended is None or job.watch.config.on_alarm != "roll_back":
        return False
    alarm = job.watch.ended
    step, aside = roll_back(job.config.output_dir, alarm, at_step=job.version)
    whose = f"the policy of step {step}" if step else "the model that the run started from"
    consequence = f"{whose} is the newest now; what came later is in {aside.relative_to(job.config.output_dir)}"
    job.log.event(Event("roll_back", "the run", sentence(alarm), consequence))
    job.progress.note(f"rolled back: {consequence}")
    if job.serving is not None:
        await job.serving.roll_back(step)
    return True


def roll_back(run_dir: Path, alarm: Alarm, *, at_step: int) -> tuple[int, Path]:
    """Set aside what came after the last checkpoint before the alarm; (step of that checkpoint, the folder aside).

    Checkpoints and batches of later steps move to rolled_back/step-NNNNNN, so that whoever resumes, exports or serves
    the run finds the policy of before. Step 0 is the model that the run started from.
    """
    kept = [saved for saved in checkpoints.finished(run_dir) if saved.step < alarm.onset]
    step = kept[-1].step if kept else 0
    aside = _free(run_dir / "rolled_back" / f"step-{at_step:06d}")
    for name in ("checkpoints", "experience"):
        (aside / name).mkdir(parents=True, exist_ok=True)
    for saved in reversed(checkpoints.finished(run_dir)):  # the newest first: no later one counts if this is cut short
        if saved.step > step:
            os.rename(saved.path, aside / "checkpoints" / saved.path.name)
    for logged in reversed(experience_log.steps(run_dir)):
        if logged > step:
            path = experience_log.path_of(run_dir, logged)
            os.rename(path, aside / "experience" / path.name)
    if (run_dir / "metrics.jsonl").exists():
        shutil.copyfile(run_dir / "metrics.jsonl", aside / "metrics.jsonl")
    why = {"alarm": alarm.name, "cause": sentence(alarm), "onset": alarm.onset, "from_step": at_step, "to_step": step}
    write_json(aside / "why.json", {"schema_version": SCHEMA_VERSION} | why)
    return step, aside


def _free(folder: Path) -> Path:
    """The folder, or with a number where a run that was resumed has been rolled back there before."""
    taken = len(list(folder.parent.glob(f"{folder.name}*")))
    return folder.with_name(f"{folder.name}-{taken + 1}") if taken else folder
