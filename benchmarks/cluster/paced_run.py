"""A run whose driver, pool, leases, queue, scaling and cluster are real, and whose engines and learner are paced."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from actors.mailbox import RolloutRequest
from actors.pool import RolloutPool
from actors.worker import Worker
from benchmarks.cluster.paced_actor import PacedActor
from cluster import nodes, train
from cluster.metrics import StepClock
from cluster.scaling import Scaling
from cluster.simulate import Simulation
from cluster.simulated import Cluster, SimulatedLearner, Workload
from contracts.clock import now
from contracts.config import DeadlinesConfig, ModelConfig
from contracts.events import Event
from contracts.records import Rollout, ScoredRollout, WeightsUpdate

_LOOK_AGAIN_S = 0.5


@dataclass(frozen=True)
class Paced:
    """A run. `learn_s` gives the seconds of a step of the learner, by the version it trains at."""

    name: str
    workers: int
    places: int  # of an engine
    steps: int
    batch_size: int
    learn_s: Callable[[int], float]
    resources: dict[str, float]  # that put its workers on their nodes
    max_workers: int | None = None  # autoscaled, from one
    interval_s: float = 10.0
    max_lag_steps: int = 2


@dataclass
class Told:
    """What a run has shown; times are seconds since all its first workers were up."""

    seconds: float = 0.0
    worker_s: float = 0.0  # from each one's process to its end
    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[tuple[float, Event]] = field(default_factory=list)
    first_sample: dict[str, float] = field(default_factory=dict)  # by actor
    asked: Counter[str] = field(default_factory=Counter)  # trajectories, in requests
    received: Counter[str] = field(default_factory=Counter)  # the same, in responses
    trained: Counter[str] = field(default_factory=Counter)


class PacedLearner(SimulatedLearner):
    """Its steps take the seconds that the plan says. It has no ranks that a node could take along."""

    node_ids: Sequence[str] = ()

    def __init__(self, learn_s: Callable[[int], float]) -> None:
        self._learn_s = learn_s
        self._published = 0

    async def step(self, samples: Sequence[ScoredRollout], *, training_version: int) -> dict[str, float]:
        await asyncio.sleep(self._learn_s(training_version))
        return {}

    async def publish(self, version: int) -> tuple[WeightsUpdate, list[object]]:
        self._published = version
        return WeightsUpdate(version, version - 1, 1, digest="", dense_bytes=1), []

    async def keyframe(self) -> tuple[WeightsUpdate, list[Any]]:
        return WeightsUpdate(self._published, None, 1, digest="", dense_bytes=1), []


class CountedPool(RolloutPool):
    """Keeps which trajectories went out and came back."""

    told: Told
    begun: float

    async def generate(self, worker: Worker, request: RolloutRequest, *, deadline_s: float) -> Rollout:
        self.told.asked[request.trajectory_id] += 1
        rollout = await super().generate(worker, request, deadline_s=deadline_s)
        self.told.received[request.trajectory_id] += 1
        self.told.first_sample.setdefault(rollout.actor_id, now() - self.begun)
        return rollout


async def run(plan: Paced, folder: Path, told: Told, *, started: asyncio.Barrier) -> None:
    """The whole run; it begins to train when all runs at the `started` barrier have their first workers."""
    async with asyncio.TaskGroup() as tasks:
        job = _job(plan, folder, told, tasks)
        try:
            await job.pool.start()
            await started.wait()
            job.pool.begun = now()
            told.events.clear()
            if plan.max_workers is not None:
                job.scaling = Scaling(job, job.config.rollout.autoscale)
            background = [
                tasks.create_task(work)
                for work in (train.collect(job), train.raise_pool_failure(job), nodes.watch(job), _count(job, told))
            ]
            clock = StepClock(job)
            while job.version < plan.steps:
                await train.learn(job, clock)
            told.seconds = now() - job.pool.begun
            for task in background:
                task.cancel()
        finally:
            await job.pool.stop()


def _job(plan: Paced, folder: Path, told: Told, tasks: asyncio.TaskGroup) -> Any:
    cluster = Cluster(
        actors=plan.workers,
        slots=plan.places,
        score_s=0.0,
        autoscale=plan.max_workers is not None,
        autoscale_interval_s=plan.interval_s,
        max_actors=plan.max_workers or plan.workers,
    )
    work = Workload(steps=plan.steps, batch_size=plan.batch_size, group_size=4, max_lag_steps=plan.max_lag_steps)
    simulation = Simulation(cluster, work, tasks, folder)
    job: Any = simulation.job
    rollout = job.config.rollout.model_copy(update={"num_cpus": 0.0, "resources": plan.resources})
    job.config = job.config.model_copy(update={"rollout": rollout})
    AutoConfig.for_model("llama", vocab_size=1 << 10).save_pretrained(folder / "model")
    path = str(folder / "model")
    pool = CountedPool(
        ModelConfig(path=path), rollout, DeadlinesConfig(), path=path, version=0, seed=0, actor_class=PacedActor
    )
    pool.told, pool.begun = told, now()
    job.pool, job.learner, job.scaling = pool, PacedLearner(plan.learn_s), None
    pool.keyframes_from(job.learner.keyframe)

    def changed(event: Event) -> None:
        told.events.append((now() - pool.begun, event))
        tasks.create_task(job.notify())

    def experience(step: int, batch: Sequence[ScoredRollout], state: object) -> None:
        told.trained.update(sample.rollout.trajectory_id for sample in batch)

    pool.on_change = job.log.event = changed
    pool.on_update = lambda: tasks.create_task(job.notify())  # type: ignore[assignment]
    job.log.experience = experience
    job.log.metrics = lambda row: told.rows.append(dict(row))
    return job


async def _count(job: Any, told: Told) -> None:
    """Worker-seconds; the same ruler for runs with and without autoscaling."""
    at = now()
    while True:
        await asyncio.sleep(_LOOK_AGAIN_S)
        there = job.pool.counts()
        present = there.running + there.starting - there.pending + there.draining
        told.worker_s += present * (now() - at)
        at = now()
