"""Before PPO: comparisons from a file or from those who are asked (asking.py), and the reward model trained on them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from actors.pool import RolloutPool
from cluster.asking import Preferences, Question, ask
from cluster.progress import Progress
from cluster.run_log import write_json
from contracts.config import Config, ConfigError
from contracts.records import Comparison, Prompt
from contracts.waiting import answer
from feedback.formats import write_preferences, write_unpaired
from feedback.judged_files import read_judged
from learner.rank import training_environment
from learner.reward_model import RewardModelReport, train_reward_model


def _preference_file(run_dir: Path) -> Path:
    return run_dir / "preferences.parquet"


def trained_reward_model(run_dir: Path) -> Path:
    return run_dir / "reward_model"


async def prepare_reward_model(
    config: Config, prompts: Sequence[Prompt], pool: RolloutPool, *, progress: Progress
) -> None:
    """Collect comparisons, write them as preferences.parquet, train the reward model on them.

    Raises:
        ConfigError: too few comparisons are left to train on.
    """
    section = config.preferences
    assert section is not None
    if not section.paths:
        question = Question(1, pool.newest_version, _preference_file(config.output_dir))
        preferences = await ask(config, prompts, pool, question, progress=progress)
    else:
        judged = await asyncio.to_thread(read_judged, section.paths)
        preferences = Preferences(judged.comparisons, judged.dropped, judged.rows, 0, {}, None, judged.labels)
        write_preferences(judged.comparisons, _preference_file(config.output_dir))
        if judged.labels:
            write_unpaired(judged.labels, config.output_dir / "labels.parquet")
    record = await train_on(config, preferences, trained_reward_model(config.output_dir), progress=progress)
    write_json(config.output_dir / "preferences.json", record)


async def train_on(config: Config, preferences: Preferences, folder: Path, *, progress: Progress) -> dict[str, Any]:
    """Train a reward model and write it to `folder`; returns what preferences.json says about it.

    Raises:
        ConfigError: too few comparisons are left to train on.
    """
    section = config.preferences
    assert section is not None
    labels = f" and {len(preferences.labels)} labels" if preferences.labels else ""
    progress.phase(f"Training the reward model on {len(preferences.comparisons)} comparisons{labels}")
    report = await _train(config, preferences, folder, progress=progress)
    progress.note(
        f"reward model: right on {report.held_out_accuracy:.0%} of {report.held_out_pairs} held-out comparisons "
        f"(95 % interval {report.held_out_accuracy_low:.0%} to {report.held_out_accuracy_high:.0%}), "
        f"{report.seconds:.0f} s"
    )
    return _record(preferences, report, section.simulate is not None)


async def _train(config: Config, preferences: Preferences, folder: Path, *, progress: Progress) -> RewardModelReport:
    section = config.preferences
    assert section is not None
    base = section.reward_model.base or config.model.path  # as configured: the reward card names it
    worker = config.reward_workers
    # One call a worker: the process ends with the training, and its gigabytes with it.
    task: Any = ray.remote(max_calls=1, max_retries=0)(_train_remotely)  # type: ignore[arg-type]
    ref = task.options(
        num_cpus=worker.num_cpus,
        num_gpus=worker.num_gpus,
        resources=dict(worker.resources),
        runtime_env={"env_vars": training_environment()},
    ).remote(
        preferences.comparisons,
        section.reward_model,
        labels=preferences.labels,
        base=base,
        output_dir=_absolute(folder),
        seed=config.seed,
        threads=worker.threads,
        device="cuda" if worker.num_gpus else "cpu",
    )
    progress.waiting("the reward model's training")
    try:
        report: RewardModelReport = await answer(
            ref, who="the reward model's trainer", asked="finish", deadline_s=config.deadlines.learn_s
        )
    except ValueError as error:
        raise ConfigError(f"preferences: {error}") from error
    finally:
        progress.waiting("")
    return report


def _absolute(folder: Path) -> str:
    """The trainer may run in another directory."""
    return str(folder.resolve())


def _train_remotely(
    rows: list[Comparison], config: Any, *, output_dir: str, threads: int | None, **options: Any
) -> RewardModelReport:
    threads = threads or os.cpu_count()  # Ray lets a worker have one by default
    return train_reward_model(rows, config, output_dir=Path(output_dir), threads=threads, **options)


def _record(preferences: Preferences, report: RewardModelReport, simulated: bool) -> dict[str, Any]:
    accuracy = {
        "mean": report.held_out_accuracy,
        "low": report.held_out_accuracy_low,
        "high": report.held_out_accuracy_high,
        "n": report.held_out_prompts,
    }
    reward_model = {"held_out_accuracy": accuracy, "reward_version": report.reward_version}
    recorded = ("train_pairs", "train_labels", "held_out_pairs", "held_out_loss", "held_out_calibrated_loss", "seconds")
    reward_model |= {name: asdict(report)[name] for name in recorded}
    return {
        "schema_version": 1,
        "simulated": simulated,
        "pairs": preferences.pairs,
        "votes": preferences.votes,
        "dropped": preferences.dropped,
        "voters": preferences.voters,
        "agreement_with_gold": preferences.agreement_with_gold,
        "reward_model": reward_model,
    }
