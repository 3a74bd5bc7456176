"""`headrace reward-train`: a reward model from files of judged rows, without a policy, an engine or Ray."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from cluster.half_written import sweep
from cluster.preferences import trained_reward_model
from cluster.preflight import model_files
from cluster.preflight.checks import check_judged_files
from cluster.preflight.run_folder import flat
from cluster.progress import Progress
from cluster.run_log import write_whole
from contracts import loading as configuration
from contracts.config import ConfigError
from contracts.reward_model import RewardTrainConfig
from contracts.stopping import StopRequest
from feedback.judged_files import Judged, read_judged
from learner.reward_model import Interrupted, RewardModelReport, train_reward_model

CHECKPOINT = "checkpoint"
_MAY_CHANGE_ON_RESUME = ("resume", "output_dir", "preferences.reward_model.checkpoint_steps")


@dataclass(frozen=True)
class RewardTraining:
    """What was checked and may start."""

    config: RewardTrainConfig
    base: str


def check_reward_train(config: RewardTrainConfig) -> RewardTraining:
    """Check what can be checked before a model loads or a file is written.

    Raises:
        ConfigError: one line that names the field or file and what to do.
    """
    folder = config.output_dir
    saved = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder}: is a file; choose another folder")
    if trained_reward_model(folder).exists():
        raise ConfigError(f"output_dir {folder}: holds a trained reward model; choose another, or remove it")
    if config.resume:
        if not saved.is_file():
            raise ConfigError(f"output_dir {folder}: there is no training to resume; start one without resume=true")
        _check_same_training(config, saved)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"output_dir {folder} is not empty: choose another, remove it, or continue with resume=true")
    check_judged_files(config.preferences.paths)
    base = str(config.preferences.reward_model.base)
    field = "preferences.reward_model.base"
    located = model_files.locate(base, field)
    if located is not None:
        model_files.check_folder(located, field, chat=True)
    return RewardTraining(config, base)


async def train_from_files(
    training: RewardTraining, progress: Progress, stopping: StopRequest
) -> RewardModelReport | None:
    """Read, train, write. None where `stopping` ended it after a step; `resume=true` continues it.

    Raises:
        ConfigError: rows or a base that cannot be trained on.
    """
    config = training.config
    progress.phase("Reading what was judged")
    judged = await asyncio.to_thread(read_judged, config.preferences.paths)
    dropped = ", ".join(f"{count} {reason}" for reason, count in judged.dropped.items()) or "none"
    progress.note(f"{len(judged.comparisons)} comparisons, {len(judged.labels)} labels; left out: {dropped}")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    sweep(config.output_dir)
    write_whole(config.output_dir / "config.yaml", configuration.dump(config))
    progress.phase(f"Training the reward model from {training.base}")
    asked_to_stop = threading.Event()  # read in the training's thread
    watching = asyncio.create_task(_pass_on(stopping, asked_to_stop))
    stopping.graceful = True
    try:
        report = await asyncio.to_thread(_train, training, judged, progress, asked_to_stop)
    except Interrupted as stopped:
        progress.note(f"stopped {stopped}, which a checkpoint holds")
        return None
    except ValueError as error:
        raise ConfigError(f"preferences: {error}") from error
    finally:
        asked_to_stop.set()
        watching.cancel()
    for line in in_words(report, trained_reward_model(config.output_dir)):
        progress.note(line)
    return report


def _train(
    training: RewardTraining, judged: Judged, progress: Progress, asked_to_stop: threading.Event
) -> RewardModelReport:
    config = training.config
    return train_reward_model(
        judged.comparisons,
        config.preferences.reward_model,
        labels=judged.labels,
        base=training.base,
        output_dir=trained_reward_model(config.output_dir),
        seed=config.seed,
        threads=config.threads or os.cpu_count(),
        on_progress=progress.note,
        device=config.device,
        checkpoint_dir=config.output_dir / CHECKPOINT,
        should_stop=asked_to_stop.is_set,
    )


async def _pass_on(stopping: StopRequest, event: threading.Event) -> None:
    await stopping.wait()
    event.set()


def in_words(report: RewardModelReport, folder: Path) -> list[str]:
    """What a person wants to know at the end, in lines."""
    lines = [f"{folder}: reward_version {report.reward_version}"]
    for name, found in report.heads.items():
        lines.append(
            f"  {name}: right on {found['accuracy']:.1%} of {found['rows']:.0f} held-out rows (95 % interval "
            f"{found['accuracy_low']:.1%} to {found['accuracy_high']:.1%} over {found['prompts']:.0f} prompts), "
            f"{found['calibrated_loss']:.3f} nats calibrated, {found['loss']:.3f} before"
        )
    return lines


def _check_same_training(config: RewardTrainConfig, saved_file: Path) -> None:
    saved = configuration.load(saved_file, kind=RewardTrainConfig)
    before, now = flat(saved.model_dump(mode="json")), flat(config.model_dump(mode="json"))
    different = [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in _MAY_CHANGE_ON_RESUME
    ]
    if different:
        raise ConfigError(
            f"resume: not the training of {saved_file}, these may not change ({'; '.join(different)}); set them back "
            "or choose another output_dir"
        )
