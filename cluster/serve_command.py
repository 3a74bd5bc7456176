"""`headrace serve`: a policy behind the OpenAI API, on this machine alone or on a cluster, until it is stopped."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException

from actors.applications import delete_application, run_application
from actors.replicas import watch
from actors.reward import RewardHandle, ScoreRequest
from cluster import launch
from cluster.checkpoints import verified
from cluster.preferences import trained_reward_model
from cluster.preflight import model_files
from cluster.preflight.checks import check_function, check_vllm
from cluster.progress import Progress
from contracts.config import Config, ConfigError, RewardConfig
from contracts.events import Event, first_line
from contracts.serving import ServingConfig
from contracts.stopping import StopRequest
from contracts.waiting import NoAnswer, answer
from learner import checkpoint as checkpoints
from models import bundled
from serving.app import Policy, build
from serving.keys import load_keys
from serving.records import StartWeights

_STOP_MARGIN_S = 30.0
_NOT_THERE = (NoAnswer, RayActorError, RayTaskError, RayServeException)


@dataclass(frozen=True)
class ServeJob:
    """What is checked before anything starts."""

    config: Config
    serving: ServingConfig
    policy: str  # a path as in model.path
    version: int
    components: tuple[RewardConfig, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Scorer:
    """Asks one component of the reward, from any process."""

    handle: RewardHandle
    deadline_s: float

    async def __call__(self, messages: list[dict[str, str]], response: str) -> tuple[float, str]:
        """The score, and the version of what gave it. Raises ValueError for what cannot be scored."""
        prompt = next((each["content"] for each in reversed(messages) if each["role"] == "user"), "")
        score = await self.handle.score(ScoreRequest(messages, prompt, response, {}), deadline_s=self.deadline_s)
        if score.error:
            raise ValueError(score.error)
        return score.value, score.version


def check_serving(config: Config) -> ServeJob:
    """What can be known before a model loads.

    Raises:
        ConfigError: one line that names the field and what to do.
    """
    serving = config.serving or ServingConfig()
    if serving.gate is not None:
        raise ConfigError("serving.gate: nothing judges versions yet: leave it out, and pin or roll back by hand")
    serving = serving.model_copy(update={"keys": serving.keys.resolve() if serving.keys else None})
    if config.ray.address is None:
        check_vllm(on_gpu=serving.replicas.num_gpus > 0)
        check_port(serving)
    keys = load_keys(serving.keys)
    if not keys and not _is_loopback(serving.host):
        raise ConfigError(
            f"serving.host is {serving.host}, so others can reach it: set serving.keys or HEADRACE_API_KEYS "
            "(`headrace key` makes one), or serve on 127.0.0.1"
        )
    path, version, field, notes = find_policy(config, serving)
    folder = model_files.locate(path, field)
    if folder is not None:
        model_files.check_folder(folder, field, chat=True, max_context_tokens=config.model.max_context_tokens)
    components = []
    for index, component in enumerate(config.rewards):
        if component.model == "preferences" and not trained_reward_model(config.output_dir).is_dir():
            notes.append(f"/v1/score leaves {component.name} out: the run has trained no reward model yet")
            continue
        if component.function is not None:
            check_function(component.function, f"rewards.{index}.function")
        components.append(component)
    return ServeJob(config, serving, path, version, tuple(components), tuple(notes))


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


def check_port(serving: ServingConfig) -> None:
    """Raises ConfigError where another program listens there already, or the machine has no such address."""
    family = socket.AF_INET6 if ":" in serving.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            message = f"cannot listen on {serving.host}:{serving.port}: {error.strerror}"
            raise ConfigError(f"{message}; set serving.port or serving.host to another") from None


async def serve_policy(job: ServeJob, progress: Progress, stopping: StopRequest) -> None:
    """Serve until `stopping`; then what runs is finished, and nothing of the application is left."""
    config, serving = job.config, job.serving
    name, deadlines = serving.application, config.deadlines
    for note in job.notes:
        progress.warn(note)
    progress.phase(f"Loading {job.policy}")
    path = await asyncio.to_thread(bundled.resolve, job.policy)
    policy = Policy(StartWeights(path, job.version, config.model.dtype), config.model.max_context_tokens)
    ray_config = config.ray.model_copy(update={"num_cpus": config.ray.num_cpus or _local_cpus(job)})
    config = config.model_copy(update={"ray": ray_config})
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(launch.cluster(config, name, progress, learner_only=True))
        await _start_http(serving, deadline_s=deadlines.start_s)
        stack.push_async_callback(_remove, job, deadline_s=deadlines.stop_s)
        progress.phase(f"Starting {serving.replicas.min_replicas + len(serving.pinned)} engine(s)")
        progress.waiting("models to load")
        scorers = await _scorers(job)
        folder = config.output_dir.resolve() / "serving"
        bound = await asyncio.to_thread(
            build, serving, policy, folder, scorers=scorers, start_s=deadlines.start_s, health_s=deadlines.health_s
        )
        await run_application(bound, name, start_s=deadlines.start_s, route_prefix="/")
        progress.waiting("")
        progress.phase(f"Serving {serving.name}, version {job.version}")
        progress.result(_where(serving))
        stopping.graceful = True
        await _until_stopped(job, progress, stopping)
        progress.phase("Finishing the answers that are being written")
        await delete_application(name, deadline_s=serving.request_s + _STOP_MARGIN_S)


async def _until_stopped(job: ServeJob, progress: Progress, stopping: StopRequest) -> None:
    """Ends with the wish to stop, or raises with the application."""
    fixed = job.serving.replicas.min_replicas == job.serving.replicas.max_replicas

    def tell(event: Event) -> None:
        if fixed:  # else a replica that is gone may just not be needed any more
            progress.warn(f"{event.who}: {event.cause}; {event.consequence}")

    applications = {job.serving.application: "the policy"}
    watching = asyncio.create_task(watch(applications, on_event=tell, deadline_s=job.config.deadlines.silent_s))
    told = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({watching, told}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
    finally:
        watching.cancel()
        told.cancel()


async def _start_http(serving: ServingConfig, *, deadline_s: float) -> None:
    """Ray Serve with a door to HTTP.

    Raises:
        ConfigError: Serve runs on this cluster without one, and cannot get one any more.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    options = HTTPOptions(host=serving.host, port=serving.port, location=ProxyLocation.HeadOnly)
    start = asyncio.to_thread(serve.start, http_options=options, logging_config={"log_level": "ERROR"})
    await answer(start, who="Ray Serve", asked="start", deadline_s=deadline_s)
    status = await answer(asyncio.to_thread(serve.status), who="Ray Serve", asked="start", deadline_s=deadline_s)
    if not status.proxies:
        raise ConfigError(
            "Ray Serve runs on this cluster already, without HTTP: stop it with `serve shutdown` when nothing needs "
            "it, or serve on another cluster"
        )


async def _scorers(job: ServeJob) -> Mapping[str, tuple[float, Scorer]]:
    components = await launch.deploy_components(
        job.config,
        job.components,
        f"{job.serving.application}-score",
        trained_model=trained_reward_model(job.config.output_dir).resolve(),
    )
    score_s = job.config.deadlines.score_s
    return {each.config.name: (each.config.weight, Scorer(each, score_s)) for each in components.handles}


async def _remove(job: ServeJob, *, deadline_s: float) -> None:
    name = job.serving.application
    for each in (name, *(f"{name}-score-{component.name}" for component in job.components)):
        try:
            await delete_application(each, deadline_s=deadline_s)
        except _NOT_THERE as error:
            logging.getLogger("headrace.serving").warning(
                "Serve application %s may be left: %s", each, first_line(error)
            )


def _local_cpus(job: ServeJob) -> int:
    """What the application reserves, and one for Ray's own."""
    replicas, rewards = job.serving.replicas, job.config.reward_workers
    engines = (replicas.max_replicas + len(job.serving.pinned)) * replicas.num_cpus
    return math.ceil(engines + len(job.components) * rewards.num_replicas * rewards.num_cpus + 1)


def _where(serving: ServingConfig) -> str:
    host = f"[{serving.host}]" if ":" in serving.host else serving.host
    url = f"http://{host}:{serving.port}"
    return (
        f"OpenAI API: {url}/v1 (model {serving.name})\n"
        f"Chat page:  {url}/\nVersions:   {url}/v1/versions\nMetrics:    {url}/metrics\n"
        "Ctrl-C finishes what runs and stops; again to stop at once"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
