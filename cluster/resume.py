"""Going on with a run: the newest whole checkpoint, then the batches logged after it, trained again.

A batch in the experience log counts as trained: its responses are neither sampled nor trained a second time, its row
in metrics.jsonl stays, and only where the run ended between the two is the row written now. What was queued or running
when the last batch was chosen is expired, and its prompts come first.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from cluster import experience_log, recover, watch
from cluster.job import Job
from cluster.metrics import StepClock, reward_metrics
from cluster.preflight import Preflight
from cluster.progress import Progress
from cluster.reproducible import differences
from cluster.run_log import metrics_rows
from contracts.config import Config, ConfigError
from contracts.records import Prompt, experience_records
from learner import checkpoint as checkpoints
from learner.experience_queue import ScoredGroup


@dataclass(frozen=True)
class Resumption:
    """From where a run goes on.

    `checkpoint` is None where there was none yet: the initial model. Steps up to `last_logged` are trained again from
    the log, those after `last_row` have no row in metrics.jsonl yet. `state` is where the run stood then, None where
    it was killed before its first batch.
    """

    checkpoint: checkpoints.Checkpoint | None
    last_logged: int
    last_row: int
    state: dict[str, Any] | None
    problems: tuple[str, ...] = ()  # why newer checkpoints were passed over

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def quarantined(self) -> int:
        """Trajectories by then; later ones are open again."""
        return self.state["leases"]["counts"]["quarantined"] if self.state else 0


def resumption(config: Config, preflight: Preflight, progress: Progress) -> Resumption | None:
    """Where to go on, None for a fresh run; says which newer checkpoints and batches were passed over.

    Raises:
        ConfigError: there are checkpoints, but none is whole.
    """
    if preflight.resume_step is None:
        return None
    run_dir = config.output_dir
    saved, problems = checkpoints.newest_whole(run_dir)
    for problem in problems:
        progress.warn(f"passed over a damaged checkpoint: {problem}")
    if saved is None and problems:
        raise ConfigError(f"output_dir {run_dir}: no checkpoint is whole: {problems[0]}")
    step = saved.step if saved else 0
    last_logged, problem = experience_log.last_whole(run_dir, after=step)
    if problem:
        progress.warn(f"steps after {last_logged} are done again: {problem}")
    rows = metrics_rows(run_dir)
    last_row = next((each - 1 for each in range(step + 1, last_logged + 1) if each not in rows), last_logged)
    again = f", {last_logged - step} from the experience log" if last_logged > step else ""
    progress.note(f"resuming after step {last_logged}{again}")
    state = None
    if last_logged > step:
        state = experience_log.state(run_dir, last_logged)
    elif saved is not None:
        state = json.loads((saved.state / "run.json").read_text(encoding="utf-8"))
    return Resumption(saved, last_logged, last_row, state, tuple(problems))


def restore(job: Job, found: Resumption, prompts: Sequence[Prompt]) -> None:
    """Put queue, leases and prompt order back as they were; what was open is issued again first."""
    job.resumption, job.last_checkpoint = found, found.checkpoint
    if found.state is None:
        return
    state, groups = found.state, []
    if found.checkpoint is not None and found.last_logged == found.step:
        samples = experience_records(pq.read_table(found.checkpoint.state / "queue.parquet"))
        groups = [
            ScoredGroup(group_id, started, tuple(sample for sample in samples if sample.rollout.group_id == group_id))
            for group_id, started in state["queued"].items()
        ]
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    job.prompts.restore(state["prompts"])
    job.pending = [by_id[prompt_id] for prompt_id in state["open_prompts"]]
    job.leases.restore(state["leases"], groups)
    job.queue.restore(groups)


async def catch_up(job: Job, publish: Callable[[Job, int], Awaitable[dict[str, Any]]]) -> None:
    """Train again on what was logged after the checkpoint, and publish it, as the run did.

    Where that gives other weights than before, because threads or versions changed, the run goes on from these, and a
    checkpoint keeps them.
    """
    found = job.resumption
    if found is None:
        return
    await watch.look_back(job, found.step)
    if found.last_logged == found.step:
        return
    job.progress.phase(f"Training again on the logged batches of steps {found.step + 1} to {found.last_logged}")
    rows = metrics_rows(job.config.output_dir)
    reasons: list[str] = []
    for step in range(found.step + 1, found.last_logged + 1):
        samples, state = job.log.logged(step), experience_log.state(job.config.output_dir, step)
        clock = StepClock(job)
        clock.waited()
        job.progress.waiting(f"the learner: step {step} again")
        trained = await recover.train(job, samples)
        clock.learned()
        sent = await publish(job, step)
        seen = watch.look(job, samples)
        row = clock.row(samples) | reward_metrics(samples) | seen.row | trained | sent | job.pool.take_delivery_costs()
        reason = _differs(step, rows.get(step), row, state, job.provenance)
        reasons += [reason] if reason else []
        if step > found.last_row:
            await _log_metrics(job, step, row | _fates(state))
        job.progress.step(rows.get(step, row))
    if reasons:
        job.progress.warn(f"{reasons[0]}; the run goes on from the weights that it has now")
        await recover.checkpoint_or_later(job)


async def _log_metrics(job: Job, step: int, row: Mapping[str, Any]) -> None:
    await recover.written(job, f"the metrics of step {step}", lambda: job.log.metrics(row))


def _differs(
    step: int, before: Mapping[str, Any] | None, row: Mapping[str, Any], then: Mapping[str, Any], now: Mapping[str, Any]
) -> str:
    """Why the weights of a step are, or may be, not those that it had; "" where they are."""
    digest = None if before is None else before.get("weights_digest")
    if digest == row["weights_digest"]:
        return ""
    changed = [
        *differences(then["environment"], now["environment"]),
        *differences(then["settings"], now["settings"]),
    ]
    if digest is None and not changed:
        return ""
    how = "has other weights than before" if digest is not None else "may have other weights than before"
    return f"step {step}, trained again, {how} ({'; '.join(changed) or 'nothing that is recorded has changed'})"


def _fates(state: Mapping[str, Any]) -> dict[str, int]:
    return {f"trajectories_{fate}": count for fate, count in state["leases"]["counts"].items()}
