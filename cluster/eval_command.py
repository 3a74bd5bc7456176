"""`headrace eval`: a checkpoint's policy on any prompt file, with the run's own rewards, judges and reference."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from transformers import AutoTokenizer

from actors.pool import RolloutPool
from actors.prompts import read_rows, render
from actors.reference import ReferenceModel
from actors.reward import RewardComponents
from cluster import launch
from cluster.evaluate import Evaluation, evaluate, intervals, record
from cluster.preferences import trained_reward_model
from cluster.progress import Progress
from cluster.reward_rollout import newest
from cluster.run_log import write_json
from contracts.config import Config
from contracts.records import Prompt
from learner import checkpoint as checkpoints
from models import bundled


@dataclass
class CheckpointJob:
    """What `cluster.evaluate` needs, without a learner."""

    config: Config
    eval_prompts: list[Prompt]
    pool: RolloutPool
    rewards: RewardComponents
    judges: RewardComponents
    reference: ReferenceModel
    progress: Progress
    version: int


async def evaluate_checkpoint(
    settings: tuple[Config, checkpoints.Checkpoint], output: Path | None, progress: Progress
) -> Evaluation:
    """Print a table of means and intervals, and write them as JSON where `output` is given."""
    evaluation = await _evaluate(*settings, progress)
    progress.result(_table(evaluation))
    if output is not None:
        write_json(output, record(evaluation))
        progress.note(f"wrote {output}")
    return evaluation


async def _evaluate(config: Config, saved: checkpoints.Checkpoint, progress: Progress) -> Evaluation:
    rows = read_rows(config.prompts.path)
    base_path = await asyncio.to_thread(bundled.resolve, config.model.path)
    tokenizer = await asyncio.to_thread(AutoTokenizer.from_pretrained, str(saved.policy))
    prompts, skipped = render(rows, tokenizer, system=config.prompts.system, max_prompt_tokens=config.max_prompt_tokens)
    if skipped:
        progress.warn(f"{skipped} prompts are longer than {config.max_prompt_tokens} tokens: skipped")
    run_id = launch.new_run_id()
    run_dir = saved.path.parent.parent
    trained, rolled_out = trained_reward_model(run_dir), newest(run_dir)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(launch.cluster(config, run_id, progress))
        pool = RolloutPool(
            config.model,
            config.rollout,
            config.deadlines,
            path=str(saved.policy),
            version=saved.step,
            seed=config.seed,
            repeatable=config.deterministic,
        )
        stack.push_async_callback(pool.stop)
        progress.phase("Starting the engine, reward replicas and the reference model")
        reference, rewards, judges, _ = await asyncio.gather(
            launch.deploy_reference_model(config, base_path, run_id),
            launch.deploy_components(config, config.rewards, run_id, trained_model=trained, rolled_out=rolled_out),
            launch.deploy_components(
                config, config.evaluation.judges, run_id, trained_model=trained, rolled_out=rolled_out
            ),
            pool.start(),
        )
        job = CheckpointJob(config, prompts, pool, rewards, judges, reference, progress, saved.step)
        return await evaluate(job)


def _table(evaluation: Evaluation) -> Table:
    table = Table(title=f"Version {evaluation.version} on {len(evaluation.prompts)} prompts (95 % intervals)")
    for column in ("", "mean", "from", "to"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, interval in intervals(evaluation).items():
        table.add_row(name, f"{interval.mean:.3f}", f"{interval.low:.3f}", f"{interval.high:.3f}")
    return table
