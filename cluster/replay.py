"""`headrace replay`: the weights of any step of a run, from a checkpoint or initial model and the experience log."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import experience_log, launch
from cluster.progress import Progress
from cluster.reproducible import decisive_settings, differences
from cluster.run_log import metrics_rows
from contracts.config import Config, ConfigError
from learner import checkpoint as checkpoints
from learner.group import LearnerGroup
from learner.numerics import numerics, threads_of
from models import bundled
from models.weights import folder_digest


@dataclass(frozen=True)
class Replay:
    """What is to be computed again: the steps after `base` (None: the initial model) up to `step`, into `to`."""

    config: Config
    run_dir: Path
    base: checkpoints.Checkpoint | None
    step: int
    to: Path

    @property
    def steps(self) -> range:
        return range((self.base.step if self.base else 0) + 1, self.step + 1)


def replay_settings(config: Config, run_dir: Path, step: int, to: Path | None) -> tuple[Replay, list[str]]:
    """What to replay, and why newer checkpoints before `step` were passed over. `config` is that of the run.

    Raises:
        ConfigError: a step that the run does not have, a batch that is missing or damaged, settings, software or
            threads that are not those of the run, or `to` exists.
    """
    to = to or run_dir / "replay" / f"step-{step:06d}"
    if to.exists():
        raise ConfigError(f"--to {to}: exists already; choose another folder")
    logged = experience_log.steps(run_dir)
    if step not in logged:
        known = f"steps {logged[0]} to {logged[-1]}" if logged else "no step"
        raise ConfigError(f"--step {step}: {run_dir / 'experience'} holds {known}")
    base, problems = checkpoints.newest_whole(run_dir, before=step)
    replay = Replay(config, run_dir, base, step, to)
    try:
        for each in replay.steps:
            experience_log.batch(run_dir, each)
            experience_log.state(run_dir, each)
    except ValueError as problem:
        raise ConfigError(str(problem)) from problem
    here = None
    if config.ray.address is None:  # elsewhere only the ranks themselves can say
        here = numerics(config.learner, threads=threads_of(config.learner))
    check_same(replay, here)
    return replay, problems


def check_same(replay: Replay, environment: dict[str, str] | None) -> None:
    """Raise ConfigError naming what is not as it was when one of the steps was trained."""
    settings = decisive_settings(replay.config)
    for step in replay.steps:
        then = experience_log.state(replay.run_dir, step)
        different = differences(then["settings"], settings)
        if environment is not None:
            different += differences(then["environment"], environment)
        if different:
            raise ConfigError(
                f"step {step} of {replay.run_dir} cannot be computed again bit for bit, these differ "
                f"(run -> here): {'; '.join(different)}"
            )


async def replay_run(replay: Replay, problems: Sequence[str], progress: Progress) -> list[str]:
    """Compute the weights of `replay.step` again, write them to `replay.to`; returns what to tell the person.

    Raises:
        RuntimeError: they are not what the run published or what its checkpoint holds; names the first step.
    """
    for problem in problems:
        progress.warn(f"passed over a damaged checkpoint: {problem}")
    config, start = replay.config, replay.base.path if replay.base else replay.config.model.path
    base_path = await asyncio.to_thread(bundled.resolve, config.model.path)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(launch.cluster(config, launch.new_run_id(), progress, learner_only=True))
        learner = launch.learner_group(
            config,
            base_path,
            replay.base,
            lambda step: experience_log.batch(replay.run_dir, step),
            progress,
            weights_key=None,
        )
        stack.callback(learner.stop)
        progress.phase(f"Training again on steps {replay.steps[0]} to {replay.step}, from {start}")
        await learner.ready()
        check_same(replay, await learner.numerics())
        published = await _train_again(replay, learner, progress)
        partial = replay.to.with_name(replay.to.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        await learner.save_policy(partial.resolve())
    return [*_compare(replay, partial / "policy"), published, _into_place(partial, replay.to)]


async def _train_again(replay: Replay, learner: LearnerGroup, progress: Progress) -> str:
    """Every step, checked against the digest of what the run published then."""
    rows: dict[int, dict[str, Any]] = metrics_rows(replay.run_dir)
    unknown = []
    for step in replay.steps:
        progress.waiting(f"the learner: step {step} again")
        await learner.step(experience_log.batch(replay.run_dir, step), training_version=step - 1)
        update, _ = await learner.publish(step)
        recorded = rows.get(step, {}).get("weights_digest")
        if recorded is None:
            unknown.append(step)
        elif recorded != update.digest:
            raise RuntimeError(
                f"step {step}, computed again, gives other weights than the run published: digest {update.digest}, "
                f"metrics.jsonl has {recorded}"
            )
        progress.note(f"step {step}: {'no digest recorded' if recorded is None else 'the weights that were published'}")
    checked = len(replay.steps) - len(unknown)
    return f"{checked} of {len(replay.steps)} steps checked against the digests of what the run published: equal"


def _compare(replay: Replay, policy: Path) -> list[str]:
    """With the checkpoint of the same step, where there is a whole one."""
    digest = folder_digest(policy)
    said = f"step {replay.step}: weights digest {digest}"
    same = checkpoints.Checkpoint(replay.step, replay.run_dir / "checkpoints" / f"step-{replay.step:06d}")
    try:
        checkpoints.verify(same)
    except ValueError:
        return [said, "no whole checkpoint of this step to compare with"]
    saved = folder_digest(same.policy)
    if saved != digest:
        raise RuntimeError(f"step {replay.step}: digest {digest}, that of {same.path} is {saved}")
    return [said, f"equal to {same.path}"]


def _into_place(partial: Path, to: Path) -> str:
    os.rename(partial / "policy", to)
    shutil.rmtree(partial)
    return f"wrote {to}"
