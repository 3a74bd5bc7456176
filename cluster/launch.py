"""Starting everything a run consists of, and taking it down again, whatever happens in between."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from actors.applications import delete_applications
from actors.placement import missing
from actors.reference import ReferenceModel, deploy_reference
from actors.reward import RewardComponents, deploy_reward
from cluster.capacity import check_capacity, local_cpus
from cluster.loopback import LOOPBACK
from cluster.presence import announce, reap
from cluster.progress import Progress
from contracts.config import Config, DeadlinesConfig, LoggingConfig, RayConfig, RewardConfig
from contracts.events import Event
from contracts.records import ScoredRollout
from contracts.serving import ServingConfig
from contracts.waiting import NoAnswer, answer
from learner.checkpoint import Checkpoint
from learner.group import LearnerGroup
from learner.rank import LearnerSettings
from models import bundled

_SERVE_SETTINGS = {
    # One that leaves its health checks unanswered cannot hear that it should finish: without this it keeps its GPU and
    # memory for as long as its answers may take, and on a cluster without more of them nobody comes in its place.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}


class OnRay(Protocol):
    """What starting Ray takes of a configuration."""

    @property
    def ray(self) -> RayConfig: ...

    @property
    def deadlines(self) -> DeadlinesConfig: ...

    @property
    def logging(self) -> LoggingConfig: ...


def start_ray(
    config: OnRay, working_dir: Path, *, learner_only: bool = False, served: ServingConfig | None = None
) -> dict[str, str]:
    """Connect to the configured cluster, or start a local Ray on loopback alone, and Serve unless `learner_only`.

    `served`: the application that the run starts, for what it needs. Returns the URLs that a person may want to open,
    by what is there.
    """
    # Workers run with Ray's directory as theirs: they find the project's and the user's modules by this.
    folders = [str(working_dir), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    search_path = os.pathsep.join(dict.fromkeys(filter(None, folders)))
    # Learner, engine and replicas share cores: threads that spin while they wait would take them from each other.
    environment = {"PYTHONPATH": search_path, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    runtime_env: dict[str, Any] = {"env_vars": environment}
    options: dict[str, Any] = {
        "runtime_env": runtime_env,
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    if config.ray.address is None:
        runtime_env["worker_process_setup_hook"] = "cluster.loopback.keep_replicas_in"
        options |= {
            "address": "local",
            "num_cpus": config.ray.num_cpus or (local_cpus(config, served=served) if isinstance(config, Config) else 1),
            "object_store_memory": int(config.ray.object_store_gib * 2**30),
            "include_dashboard": config.ray.dashboard,
            "dashboard_host": LOOPBACK,
            "_metrics_export_port": config.logging.metrics_port,
        }
    else:
        options["address"] = config.ray.address
    # The command handles signals itself, so it is no news that Ray cannot in a thread.
    logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM handler" not in record.getMessage())
    context: Any = _started(options)
    bound_to = context.address_info["node_ip_address"]
    if config.ray.address is None and bound_to != LOOPBACK:
        ray.shutdown()
        raise RuntimeError(f"the local Ray bound to {bound_to}, not to loopback; call stay_on_loopback() first")
    if learner_only or not isinstance(config, Config):
        return {}
    check_capacity(config, served=served)
    start_serve()
    dashboard = {"Ray dashboard": f"http://{context.dashboard_url}"} if context.dashboard_url else {}
    port = context.address_info["metrics_export_port"]
    return dashboard | {"Prometheus metrics": f"http://{bound_to}:{port}/metrics"}


def start_serve() -> None:
    """Ray Serve without proxies for HTTP: what callers reach listens itself."""
    # A replica that computes on every core is slow to say how long its queue is; Serve warns of each such answer.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="Disabled",
        logging_config={"log_level": "ERROR"},
        controller_options={"runtime_env": {"env_vars": _SERVE_SETTINGS}},
    )


def _started(options: dict[str, Any]) -> Any:
    """Ray gives its own processes half a minute, and says of those that were late neither who nor why."""
    try:
        return ray.init(**options)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        load, cores = os.getloadavg()[0], os.cpu_count()
        raise RuntimeError(
            f"Ray's own processes were not up after 30 s: {load:.0f} processes compete for {cores} cores here; start "
            "again when less else runs (a run goes on with resume=true)"
        ) from error


def take_sigterm_back() -> None:
    """Ray's core handles SIGTERM by aborting the process 3 s later: put back the handler that Python knows."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.siginterrupt(signal.SIGTERM, False)


def learner_group(
    config: Config,
    model_path: str,
    saved: Checkpoint | None,
    logged: Callable[[int], list[ScoredRollout]],
    progress: Progress,
    *,
    weights_key: bytes | None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> LearnerGroup:
    """The learner, not started yet; `saved` is what it continues, `logged` the experience log."""

    def learner_changed(event: Event) -> None:
        on_event(event)
        if event.event == "death":
            progress.warn(f"{event.who} {event.cause}; {event.consequence}")
        elif event.event == "pending":
            progress.note(f"{event.who} {event.cause}; {event.consequence}")

    settings = LearnerSettings(
        model_path=model_path,
        critic_path=bundled.resolve(config.model.critic_path) if config.model.critic_path else None,
        algorithm=config.algorithm,
        training=config.training,
        temperature=config.sampling.temperature,
        max_response_tokens=config.sampling.max_response_tokens,
        total_steps=config.steps,
        seed=config.seed,
        mask_older_than=config.streaming.max_lag_steps if config.streaming.stale_tokens == "mask" else None,
        weights=config.streaming.weights,
        weights_dtype=config.model.dtype,
        weights_key=weights_key,
    )
    return LearnerGroup(
        settings,
        config.learner,
        config.deadlines,
        logged=logged,
        on_change=learner_changed,
        snapshot=saved.state.resolve() if saved else None,
        step=saved.step if saved else 0,
        missing=partial(missing, deadline_s=config.deadlines.nodes_s),
    )


async def deploy_components(
    config: Config,
    components: tuple[RewardConfig, ...],
    run_id: str,
    *,
    trained_model: Path | None,
    rolled_out: Mapping[str, Path] | None = None,
) -> RewardComponents:
    """Deploy reward components or judges, all at once; `trained_model` stands for `model: preferences`.

    `rolled_out` are the folders of those that changed to another reward model since the run began.
    """

    def model_path(component: RewardConfig) -> str | None:
        if rolled_out is not None and component.name in rolled_out:
            return str(rolled_out[component.name])
        return str(trained_model) if component.model == "preferences" else component.model

    handles = await asyncio.gather(
        *(
            deploy_reward(
                component,
                config.reward_workers,
                application=f"{run_id}-{component.name}",
                model_path=model_path(component),
                dtype=config.model.dtype,
                max_tokens=config.model.max_context_tokens,
                start_s=config.deadlines.start_s,
                health_s=config.deadlines.health_s,
            )
            for component in components
        )
    )
    return RewardComponents(handles, deadline_s=config.deadlines.score_s)


async def deploy_reference_model(config: Config, model_path: str, run_id: str) -> ReferenceModel:
    return await deploy_reference(
        model_path,
        config.reference_workers,
        application=f"{run_id}-reference",
        dtype=config.model.dtype,
        temperature=config.sampling.temperature,
        start_s=config.deadlines.start_s,
        score_s=config.deadlines.score_s,
        health_s=config.deadlines.health_s,
    )


def new_run_id() -> str:
    """Serve application names begin with it: Serve is one per cluster, and other runs may be on it."""
    return f"headrace-{uuid.uuid4().hex[:8]}"


@asynccontextmanager
async def cluster(
    config: OnRay,
    run_id: str,
    progress: Progress,
    *,
    learner_only: bool = False,
    served: ServingConfig | None = None,
) -> AsyncIterator[None]:
    """Ray for the length of a run; afterwards the run's applications are gone, and a local Ray with them.

    `served`: the application whose door Serve should have.
    """
    progress.phase("Starting Ray" if config.ray.address is None else f"Connecting to {config.ray.address}")
    start = asyncio.to_thread(start_ray, config, Path.cwd(), learner_only=learner_only, served=served)
    where = config.ray.address or "on this machine"
    urls = await answer(start, who=f"Ray {where}", asked="start or connect", deadline_s=config.deadlines.start_s)
    take_sigterm_back()
    for what, url in urls.items():
        progress.note(f"{what}: {url}")
    shared = config.ray.address is not None and not learner_only
    try:
        if shared:
            _presence = await announce(run_id, deadline_s=config.deadlines.start_s)  # for as long as this waits
            for dead in await reap(deadline_s=config.deadlines.start_s):
                progress.warn(f"deleted the Serve applications that {dead}, a run that is dead, had left")
        yield
    finally:
        if shared:
            try:
                await delete_applications(run_id, deadline_s=config.deadlines.stop_s)
            except (NoAnswer, RayActorError, RayTaskError) as error:
                print(f"Serve applications {run_id}-* may be left: {error}", file=sys.stderr)
        try:
            stop = asyncio.to_thread(ray.shutdown)
            await answer(stop, who=f"Ray {where}", asked="shut down", deadline_s=config.deadlines.stop_s)
        except NoAnswer as error:
            print(f"processes of Ray may be left: {error}", file=sys.stderr)
