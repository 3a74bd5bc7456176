"""Starting everything a run consists of, and taking it down again, whatever happens in between."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from actors.applications import delete_applications
from actors.pool import RolloutPool, Worker
from actors.prompts import PromptStream
from actors.reference import ReferenceModel, deploy_reference
from actors.reward import RewardComponents, deploy_reward
from cluster.leases import Lease, LeaseBook
from cluster.loopback import LOOPBACK
from cluster.progress import Progress
from cluster.run_log import RunLog
from contracts.clock import BusyClock
from contracts.config import Config, ConfigError, RewardConfig
from contracts.records import Prompt
from contracts.stopping import StopRequest
from contracts.waiting import NoAnswer
from learner.checkpoint import Checkpoint
from learner.experience_queue import ExperienceQueue, StalenessBound
from learner.group import LearnerGroup, LearnerSettings
from models import bundled


@dataclass
class Job:
    """The parts of a running run. `version` is the published one, `choosing` the one the next batch trains at."""

    config: Config
    run_id: str
    prompts: PromptStream
    eval_prompts: list[Prompt]
    pool: RolloutPool
    learner: LearnerGroup
    rewards: RewardComponents
    judges: RewardComponents
    reference: ReferenceModel
    queue: ExperienceQueue
    leases: LeaseBook
    log: RunLog
    progress: Progress
    stopping: StopRequest
    version: int = 0
    choosing: int = 0
    pending: list[Prompt] = field(default_factory=list)
    scoring: BusyClock = field(default_factory=BusyClock)
    bad_reasons: list[str] = field(default_factory=list)  # of what was quarantined since the last batch
    expired_in_a_row: int = 0
    dropped_in_a_row: int = 0
    last_checkpoint: Checkpoint | None = None
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def bound(self) -> StalenessBound:
        return self.leases.bound

    @property
    def more_wanted(self) -> bool:
        """Whether the open groups do not yet fill all batches up to the last step."""
        batches = self.config.steps - self.choosing
        return self.leases.open_groups < batches * self.bound.groups_per_batch

    async def notify(self) -> None:
        """Something that lets waiting groups or a waiting learner go on has happened."""
        async with self._changed:
            self._changed.notify_all()
        await self.queue.notify()

    async def next_lease(self) -> tuple[Lease, Worker]:
        """Wait until a worker has room and the staleness bound lets another group start there.

        What unblocks it: a finished response, a batch taken by the learner, a published version, a new worker.
        """
        async with self._changed:
            while True:
                worker = self.pool.free(self.leases.num_samples)
                if (
                    worker
                    and self.more_wanted
                    and self.leases.may_start(worker.version, training_version=self.choosing)
                ):
                    prompt = self.pending.pop(0) if self.pending else self.prompts.next()
                    return self.leases.issue(prompt, version=worker.version, actor_id=worker.actor_id), worker
                await self._changed.wait()

    async def another_worker(self, lease: Lease) -> tuple[Lease, Worker]:
        """A lease whose worker died, issued again as soon as there is room elsewhere.

        Not on weights older than it was admitted for: an engine that has yet to take them would break the bound.
        """
        async with self._changed:
            while (worker := self.pool.free(lease.num_samples)) is None or worker.version < lease.started_version:
                await self._changed.wait()
        return self.leases.reissue(lease, version=worker.version, actor_id=worker.actor_id), worker


def start_ray(config: Config, working_dir: Path) -> str:
    """Connect to the configured cluster, or start a local Ray on loopback alone. Returns the dashboard's URL."""
    # Workers run with Ray's directory as theirs: they find the project's and the user's modules by this.
    folders = [str(working_dir), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    search_path = os.pathsep.join(dict.fromkeys(filter(None, folders)))
    # Learner, engine and replicas share cores: threads that spin while they wait would take them from each other.
    environment = {"PYTHONPATH": search_path, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    if config.ray.address is None:
        options |= {
            "address": "local",
            "num_cpus": config.ray.num_cpus or cpus_asked(config),
            "object_store_memory": int(config.ray.object_store_gib * 2**30),
            "include_dashboard": config.ray.dashboard,
            "dashboard_host": LOOPBACK,
        }
    else:
        options["address"] = config.ray.address
    # The command handles signals itself, so it is no news that Ray cannot in a thread.
    logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM handler" not in record.getMessage())
    context: Any = ray.init(**options)
    bound_to = context.address_info["node_ip_address"]
    if config.ray.address is None and bound_to != LOOPBACK:
        ray.shutdown()
        raise RuntimeError(f"the local Ray bound to {bound_to}, not to loopback; call stay_on_loopback() first")
    check_cluster_gpus(config)
    # A replica that computes on every core is slow to say how long its queue is; Serve warns of each such answer.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


def take_sigterm_back() -> None:
    """Ray's core handles SIGTERM by aborting the process 3 s later: put back the handler that Python knows."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.siginterrupt(signal.SIGTERM, False)


def check_cluster_gpus(config: Config) -> None:
    """Raises ConfigError where the workers ask for more GPUs than the cluster has."""
    asked, there = gpus_asked(config), ray.cluster_resources().get("GPU", 0.0)
    if asked > there:
        raise ConfigError(
            f"rollout, reward_workers, reference_workers and learner ask for {asked:g} GPUs together, the cluster has "
            f"{there:g}; lower num_gpus or num_workers"
        )


def gpus_asked(config: Config) -> float:
    """GPUs that all workers of a run reserve together."""
    models = sum(component.model is not None for component in (*config.rewards, *config.evaluation.judges))
    return (
        config.rollout.num_workers * config.rollout.num_gpus
        + models * config.reward_workers.num_replicas * config.reward_workers.num_gpus
        + config.reference_workers.num_replicas * config.reference_workers.num_gpus
        + config.learner.num_ranks * config.learner.num_gpus
    )


def cpus_asked(config: Config) -> int:
    """Ray CPUs that all workers of a run reserve together; a local Ray offers that many, threads do the sharing."""
    replicas = len(config.rewards) + len(config.evaluation.judges)
    asked = (
        config.rollout.num_workers * config.rollout.num_cpus
        + replicas * config.reward_workers.num_replicas * config.reward_workers.num_cpus
        + config.reference_workers.num_replicas * config.reference_workers.num_cpus
        + config.learner.num_ranks * config.learner.num_cpus
        + 1  # training of the reward model
    )
    return max(2, int(asked + 0.999))


def learner_group(
    config: Config, model_path: str, saved: Checkpoint | None, log: RunLog, progress: Progress
) -> LearnerGroup:
    """The learner, not started yet; `saved` is what it continues."""
    settings = LearnerSettings(
        model_path=model_path,
        critic_path=bundled.resolve(config.model.critic_path) if config.model.critic_path else None,
        algorithm=config.algorithm,
        training=config.training,
        temperature=config.sampling.temperature,
        max_response_tokens=config.sampling.max_response_tokens,
        total_steps=config.steps,
        seed=config.seed,
    )
    return LearnerGroup(
        settings,
        config.learner,
        config.deadlines,
        logged=log.logged,
        note=progress.warn,
        snapshot=saved.state.resolve() if saved else None,
        step=saved.step if saved else 0,
    )


async def deploy_components(
    config: Config, components: tuple[RewardConfig, ...], run_id: str, *, trained_model: Path | None
) -> RewardComponents:
    """Deploy reward components or judges, all at once; `trained_model` stands for `model: preferences`."""
    handles = await asyncio.gather(
        *(
            deploy_reward(
                component,
                config.reward_workers,
                application=f"{run_id}-{component.name}",
                model_path=str(trained_model) if component.model == "preferences" else component.model,
                dtype=config.model.dtype,
                max_tokens=config.model.max_context_tokens,
                start_s=config.deadlines.start_s,
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
    )


def new_run_id() -> str:
    """Serve application names begin with it: Serve is one per cluster, and other runs may be on it."""
    return f"headrace-{uuid.uuid4().hex[:8]}"


@asynccontextmanager
async def cluster(config: Config, run_id: str, progress: Progress) -> AsyncIterator[None]:
    """Ray for the length of a run; afterwards the run's applications are gone, and a local Ray with them."""
    progress.phase("Starting Ray" if config.ray.address is None else f"Connecting to {config.ray.address}")
    dashboard = await asyncio.to_thread(start_ray, config, Path.cwd())
    take_sigterm_back()
    if dashboard:
        progress.note(f"Ray dashboard: {dashboard}")
    try:
        yield
    finally:
        if config.ray.address is not None:
            try:
                await delete_applications(run_id, deadline_s=config.deadlines.stop_s)
            except (NoAnswer, RayActorError, RayTaskError) as error:
                print(f"Serve applications {run_id}-* may be left: {error}", file=sys.stderr)
        await asyncio.to_thread(ray.shutdown)
