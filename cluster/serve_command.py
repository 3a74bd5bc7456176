"""`headrace serve`: a policy behind the OpenAI API, on this machine alone or on a cluster, until it is stopped."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack
from dataclasses import dataclass
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
from cluster.progress import Progress
from contracts.config import Config
from contracts.serving import ServingConfig
from contracts.stopping import StopRequest
from contracts.waiting import answer
from learner import checkpoint as checkpoints
from models import bundled
from serving.records import StartWeights


@dataclass(frozen=True)
class ServeJob:
    """What is checked before anything starts."""

    application: Application
    policy: str  # a path as in model.path
    version: int
    notes: tuple[str, ...]


def check_serving(config: Config) -> ServeJob:
    """What can be known before a model loads.

    Raises:
        ConfigError: one line that names the field and what to do.
    """
    application = check_application(config, trains_reward=False)
    path, version, field, notes = find_policy(config, application.serving)
    folder = model_files.locate(path, field)
    if folder is not None:
        model_files.check_folder(folder, field, chat=True, max_context_tokens=config.model.max_context_tokens)
    return ServeJob(application, path, version, tuple(notes))


def find_policy(config: Config, serving: ServingConfig) -> tuple[str, int, str, list[str]]:
    """Path and version of what is served first, the setting that says so, and what a person should know of it.

    Raises:
        ConfigError: serving.model is a damaged checkpoint.
    """
    if serving.model is not None:
        if not (Path(serving.model) / checkpoints.MANIFEST).is_file():
            return serving.model, 0, "serving.model", []
        saved = verified(Path(serving.model))
        return str(saved.policy), saved.step, "serving.model", []
    newest, problems = checkpoints.newest_whole(config.output_dir)
    if newest is None:
        none_yet = f"{config.output_dir} has no checkpoint: serving {config.model.path}"
        return config.model.path, 0, "model.path", [*problems, none_yet]
    return str(newest.policy.resolve()), newest.step, "serving.model", problems


async def serve_policy(job: ServeJob, progress: Progress, stopping: StopRequest) -> None:
    """Serve until `stopping`; then what runs is finished, and nothing of the application is left."""
    application = job.application
    config, serving = application.config, application.serving
    deadlines = config.deadlines
    for note in job.notes:
        progress.warn(note)
    progress.phase(f"Loading {job.policy}")
    path = await asyncio.to_thread(bundled.resolve, job.policy)
    ray_config = config.ray.model_copy(update={"num_cpus": config.ray.num_cpus or _local_cpus(application)})
    config = config.model_copy(update={"ray": ray_config})
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(launch.cluster(config, serving.application, progress, learner_only=True))
        start = asyncio.to_thread(launch.start_serve)
        await answer(start, who="Ray Serve", asked="start", deadline_s=deadlines.start_s)
        stack.push_async_callback(remove, application, deadline_s=deadlines.stop_s)
        progress.phase(f"Starting {application.num_engines}")
        await start_application(application, StartWeights(path, job.version, config.model.dtype), progress)
        progress.phase(f"Serving {serving.name}, version {job.version}")
        progress.result(f"{application.where}\nCtrl-C finishes what runs and stops; again to stop at once")
        stopping.graceful = True
        await until_stopped(application, progress, stopping)
        await finish_answers(application, progress)


def _local_cpus(application: Application) -> int:
    """What the application reserves, and one for Ray's own."""
    serving, rewards = application.serving, application.config.reward_workers
    scorers = len(application.components) * rewards.num_replicas
    return math.ceil(serving.most_engines * serving.replicas.num_cpus + scorers * rewards.num_cpus + 1)
