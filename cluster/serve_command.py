"""`headrace serve`: a policy behind the OpenAI API, on this machine alone or on a cluster, until it is stopped."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import launch
from cluster.application import (
    Application,
    check_application,
    finish_answers,
    remove,
    start_application,
    until_stopped,
)
from cluster.checkpoints import verified
from cluster.preflight import model_files
from cluster.preflight.adapters import check_adapters
from cluster.progress import Progress
from contracts.config import Config
from contracts.serving import ServingConfig
from contracts.stopping import StopRequest
from contracts.waiting import answer
from learner import checkpoint as checkpoints
from models import bundled
from models.engine_adapters import AdapterSettings
from serving.records import StartWeights


@dataclass(frozen=True)
class ServeJob:
    """What is checked before anything starts."""

    application: Application
    start: StartWeights  # its path is one as in model.path
    notes: tuple[str, ...]


def check_serving(config: Config) -> ServeJob:
    """What can be known before a model loads.

    Raises:
        ConfigError: one line that names the field and what to do.
    """
    application = check_application(config, trains_reward=False)
    start, field, notes = find_policy(config, application.serving)
    folder = model_files.locate(start.path, field)
    if folder is not None:
        model_files.check_folder(folder, field, chat=True, max_context_tokens=config.model.max_context_tokens)
        if start.adapters is not None:
            check_adapters(start.adapters.lora, str(folder), field)
    return ServeJob(application, start, tuple(notes))


def find_policy(config: Config, serving: ServingConfig) -> tuple[StartWeights, str, list[str]]:
    """What is served first, the setting that says so, and what a person should know of it.

    Of a run with LoRA that is its model under the adapter of the newest checkpoint, so that adapters of the training
    can follow; a checkpoint that `serving.model` names is served merged, as it would be exported.

    Raises:
        ConfigError: serving.model is a damaged checkpoint.
    """
    dtype, lora = config.model.dtype, config.training.lora
    if serving.model is not None:
        if not (Path(serving.model) / checkpoints.MANIFEST).is_file():
            return StartWeights(serving.model, 0, dtype), "serving.model", []
        saved = verified(Path(serving.model))
        return StartWeights(str(saved.policy), saved.step, dtype), "serving.model", []
    newest, problems = checkpoints.newest_whole(config.output_dir)
    version, notes = (newest.step if newest else 0), list(problems)
    if newest is None:
        notes.append(f"{config.output_dir} has no checkpoint: serving {config.model.path}")
    if lora is not None:
        initial = str(newest.adapter.resolve()) if newest else None
        return StartWeights(config.model.path, version, dtype, AdapterSettings(lora, initial)), "model.path", notes
    if newest is None:
        return StartWeights(config.model.path, version, dtype), "model.path", notes
    return StartWeights(str(newest.policy.resolve()), version, dtype), "serving.model", notes


async def serve_policy(job: ServeJob, progress: Progress, stopping: StopRequest) -> None:
    """Serve until `stopping`; then what runs is finished, and nothing of the application is left."""
    application = job.application
    config, serving = application.config, application.serving
    deadlines = config.deadlines
    for note in job.notes:
        progress.warn(note)
    progress.phase(f"Loading {job.start.path}")
    start = replace(job.start, path=await asyncio.to_thread(bundled.resolve, job.start.path))
    ray_config = config.ray.model_copy(update={"num_cpus": config.ray.num_cpus or _local_cpus(application)})
    config = config.model_copy(update={"ray": ray_config})
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(launch.cluster(config, serving.application, progress, learner_only=True))
        serve = asyncio.to_thread(launch.start_serve)
        await answer(serve, who="Ray Serve", asked="start", deadline_s=deadlines.start_s)
        stack.push_async_callback(remove, application, deadline_s=deadlines.stop_s)
        progress.phase(f"Starting {application.num_engines}")
        await start_application(application, start, progress)
        progress.phase(f"Serving {serving.name}, version {start.version}")
        progress.result(f"{application.where}\nCtrl-C finishes what runs and stops; again to stop at once")
        stopping.graceful = True
        await until_stopped(application, progress, stopping)
        await finish_answers(application, progress)


def _local_cpus(application: Application) -> int:
    """What the application reserves, and one for Ray's own."""
    serving, rewards = application.serving, application.config.reward_workers
    scorers = len(application.components) * rewards.num_replicas
    return math.ceil(serving.most_engines * serving.replicas.num_cpus + scorers * rewards.num_cpus + 1)
