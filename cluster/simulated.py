"""The parts of a simulated run: engines, replicas, a learner and a log that only take their time.

Each has what the coroutines of cluster/train.py use of the real one.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from actors.reward import BadSample
from actors.rollout import RolloutRequest
from actors.roster import Roster, Used, WorkerCounts
from actors.worker import WorkerLost
from contracts.clock import BusyClock, now
from contracts.events import Event
from contracts.records import Prompt, Rollout, ScoredRollout, WeightsUpdate
from contracts.waiting import answer

_TOKENS = 8  # of a mean response: enough to tell old tokens from new ones
_NEVER = math.inf


@dataclass(frozen=True)
class Cluster:
    """The machines, and how long each thing takes them."""

    actors: int = 8
    slots: int = 64  # responses that one engine works on at once
    response_s: float = 10.0  # mean of a response in a slot, stragglers aside
    response_spread: float = 0.5  # uniform within this share of the mean on either side
    straggler_fraction: float = 0.0
    straggler_factor: float = 20.0
    slow_fraction: float = 0.0  # of the actors
    slow_factor: float = 5.0
    burst_s: float = 0.0  # responses end on full multiples of it; 0: at any time
    learn_s: float = 20.0  # one step
    publish_s: float = 0.5  # until the encoded weights are in the object store
    weights_bytes: float = 1e8  # as sent
    bandwidth: float = 1e9  # bytes a second into one engine
    latency_s: float = 0.001
    apply_s: float = 0.1  # requests are held
    update_jitter_s: float = 0.0  # an engine takes new weights up to this much later
    score_s: float = 0.1
    score_replicas: int = 64
    death_every_s: float = _NEVER  # mean, of one actor
    preemption_every_s: float = _NEVER  # mean, of one actor
    notice_s: float = 30.0
    restart_s: float = 60.0
    autoscale: bool = False
    autoscale_interval_s: float = 30.0
    max_actors: int = 4096
    max_actor_hours: float = _NEVER

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("actors", "slots", "score_replicas", "max_actors")}
        for name, number in counts.items():
            if number < 1:
                raise ValueError(f"{name} is {number}, allowed is at least 1")
        for name, number in vars(self).items():
            if number < 0 or math.isnan(number):
                raise ValueError(f"{name} is {number}, allowed is at least 0")
        if self.bandwidth == 0:
            raise ValueError("bandwidth is 0: weights would never arrive")

    @property
    def mean_response_s(self) -> float:
        slow = 1 + self.slow_fraction * (self.slow_factor - 1)
        return self.response_s * slow * (1 + self.straggler_fraction * (self.straggler_factor - 1))

    @property
    def actor_samples_per_s(self) -> float:
        """r: what one actor makes that is always full."""
        return self.slots / self.mean_response_s


@dataclass(frozen=True)
class Workload:
    """The run: batches and bounds, as in its configuration."""

    steps: int = 30
    batch_size: int = 512
    group_size: int = 8
    max_lag_steps: int = 1
    stale_tokens: Literal["expire", "mask"] = "expire"
    queue_samples: int | None = None
    queue_bytes: int = 1 << 40
    lease_s: float = 3600.0
    bad_fraction: float = 0.0
    checkpoint_every_steps: int | None = None
    seed: int = 0


def response_seconds(cluster: Cluster, draw: random.Random) -> float:
    seconds = cluster.response_s * (1 + cluster.response_spread * draw.uniform(-1, 1))
    return seconds * cluster.straggler_factor if draw.random() < cluster.straggler_fraction else seconds


@dataclass(eq=False)
class Flight:
    """One response in an engine; `spans` are the versions that the engine had while it worked on it, and from when."""

    work_s: float
    done: asyncio.Future[None]
    spans: list[tuple[int, float]] = field(default_factory=list)
    held_before_s: float = 0.0
    timer: asyncio.TimerHandle | None = None

    def token_versions(self, token_s: float) -> list[int]:
        """One number for each `token_s` of the response, at least one for each version."""
        ends = [*(begun for _, begun in self.spans[1:]), now()]
        return [
            version
            for (version, begun), end in zip(self.spans, ends, strict=True)
            for _ in range(max(1, round((end - begun) / token_s)))
        ]


@dataclass(eq=False)
class SimulatedWorker:
    """An engine and what the pool knows of it: `version` is what it has proved, `served` the truth."""

    actor_id: str
    slots: int
    speed: float
    version: int
    served: int
    busy: BusyClock = field(default_factory=BusyClock)
    since: float = field(default_factory=now)
    alive: bool = True
    updating: bool = False
    held_s: float = 0.0  # for new weights, in all
    held_until: float = 0.0
    active: dict[Flight, None] = field(default_factory=dict)
    waiting: deque[Flight] = field(default_factory=deque)

    def begin(self, flight: Flight) -> None:
        """Work on it as soon as a slot is free."""
        if len(self.active) >= self.slots:
            self.waiting.append(flight)
            return
        self.active[flight] = None
        flight.spans.append((self.served, now()))
        flight.held_before_s = self.held_s
        hold_s = max(0.0, self.held_until - now())
        flight.timer = asyncio.get_running_loop().call_later(hold_s + flight.work_s, self._due, flight)

    def end(self, flight: Flight) -> None:
        """Finished, cancelled or lost: its slot is free."""
        if flight in self.active:
            assert flight.timer is not None
            flight.timer.cancel()
            del self.active[flight]
            while self.alive and self.waiting and len(self.active) < self.slots:
                self.begin(self.waiting.popleft())
        elif flight in self.waiting:
            self.waiting.remove(flight)

    def hold(self, seconds: float) -> None:
        """Requests stand still for so long."""
        self.held_s += seconds
        self.held_until = now() + seconds

    def install(self, version: int) -> None:
        self.served = version
        for flight in self.active:
            flight.spans.append((version, now()))

    def die(self) -> None:
        self.alive = False
        for flight in (*self.active, *self.waiting):
            if not flight.done.done():
                flight.done.set_exception(WorkerLost(f"rollout actor {self.actor_id} died"))

    def _due(self, flight: Flight) -> None:
        late_s = self.held_s - flight.held_before_s
        if late_s > 0:  # held in the meantime
            flight.held_before_s = self.held_s
            flight.timer = asyncio.get_running_loop().call_later(late_s, self._due, flight)
        elif not flight.done.done():
            flight.done.set_result(None)


class SimulatedPool:
    """Engines that take their time; what `collect` and `publish` use of actors.pool.RolloutPool."""

    def __init__(self, cluster: Cluster, tasks: asyncio.TaskGroup, *, seed: int, version: int) -> None:
        self._cluster = cluster
        self._tasks = tasks
        self._random = random.Random(f"pool/{seed}")
        self._roster: Roster[SimulatedWorker] = Roster(cluster.slots)
        self._started = 0
        self._starting = 0
        self._draining = 0
        self._target = cluster.actors
        self._newest = version
        self._held_s = 0.0
        self._background: set[asyncio.Task[None]] = set()
        self.on_change: Callable[[str], Coroutine[Any, Any, None]]
        self.busy = BusyClock()
        self.slot_seconds = 0.0  # of finished responses
        self.events: Counter[str] = Counter()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def workers(self) -> tuple[SimulatedWorker, ...]:
        return self._roster.workers

    def start(self) -> None:
        for _ in range(self._cluster.actors):
            self._add()
        for name, every_s, end in (
            ("death", self._cluster.death_every_s, self._kill),
            ("preemption", self._cluster.preemption_every_s, self._preempt),
        ):
            if every_s < _NEVER:
                self._spawn(self._strike(name, every_s, end))

    def reserve(self, num_requests: int, *, oldest_version: int = 0) -> SimulatedWorker | None:
        return self._roster.reserve(num_requests, oldest_version=oldest_version)

    async def generate(self, worker: SimulatedWorker, request: RolloutRequest, *, deadline_s: float) -> Rollout:
        """One response, of few tokens: one stands for an eighth of a mean response."""
        loop = asyncio.get_running_loop()
        work_s = response_seconds(self._cluster, self._random) * worker.speed
        if self._cluster.burst_s:
            work_s = math.ceil((now() + work_s) / self._cluster.burst_s) * self._cluster.burst_s - now()
        flight = Flight(work_s, loop.create_future())
        try:
            if not worker.alive:
                raise WorkerLost(f"rollout actor {worker.actor_id} died")
            worker.begin(flight)
            with worker.busy, self.busy:
                await answer(flight.done, who=worker.actor_id, asked="finish a response", deadline_s=deadline_s)
        finally:
            worker.end(flight)
            self._roster.release(worker)
        self.slot_seconds += work_s
        versions = flight.token_versions(self._cluster.response_s / _TOKENS or math.inf)
        tokens = len(versions)
        return Rollout(
            trajectory_id=request.trajectory_id,
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            prompt_tokens=request.prompt_tokens,
            response_tokens=[0] * tokens,
            response_text="",
            behavior_logprobs=[-1.0] * tokens,
            weights_versions=versions,
            finish_reason="stop",
            actor_id=worker.actor_id,
        )

    def publish(self, update: WeightsUpdate, payload: object) -> None:
        """Each engine goes to the newest version by itself."""
        self._newest = update.version
        for worker in self.workers:
            if not worker.updating:
                self._spawn(self._follow(worker))

    def take_delivery_costs(self) -> dict[str, float]:
        """The longest that an engine held its requests since the last call."""
        held_s, self._held_s = self._held_s, 0.0
        return {"generation_paused_s": held_s}

    def resize(self, num_workers: int, *, cause: str) -> None:
        """Start workers, or let some finish what they have and leave."""
        self._target = num_workers
        for _ in range(num_workers - len(self._roster) - self._starting):
            self._spawn(self._start_later())
        for worker in self.workers[num_workers:]:
            self._roster.remove(worker)
            self._spawn(self._drain(worker))

    @property
    def size(self) -> int:
        return self._target

    def counts(self) -> WorkerCounts:
        return WorkerCounts(self._target, len(self._roster), self._starting, 0, self._draining)

    def used(self) -> Used:
        return self._roster.used()

    @property
    def cold_start_s(self) -> float:
        return self._cluster.restart_s

    async def _drain(self, worker: SimulatedWorker) -> None:
        self._draining += 1
        while worker.active:  # noqa: ASYNC110 in virtual time
            await asyncio.sleep(1.0)
        self._draining -= 1

    async def _follow(self, worker: SimulatedWorker) -> None:
        cluster = self._cluster
        worker.updating = True
        while worker.alive and worker.served < self._newest:
            version = self._newest
            late_s = self._random.uniform(0, cluster.update_jitter_s)
            await asyncio.sleep(cluster.latency_s + cluster.weights_bytes / cluster.bandwidth + late_s)
            worker.hold(cluster.apply_s)
            self._held_s = max(self._held_s, cluster.apply_s)
            await asyncio.sleep(cluster.apply_s)
            worker.install(version)
            await asyncio.sleep(cluster.latency_s)
            worker.version = version
            self._roster.updated(worker)
            await self.on_change("updated")
        worker.updating = False

    def _add(self) -> None:
        slow = self._random.random() < self._cluster.slow_fraction
        name, speed = f"rollout-{self._started}", self._cluster.slow_factor if slow else 1.0
        self._started += 1
        self._roster.add(SimulatedWorker(name, self._cluster.slots, speed, self._newest, self._newest))

    async def _start_later(self) -> None:
        self._starting += 1
        await asyncio.sleep(self._cluster.restart_s)
        self._starting -= 1
        if len(self._roster) >= self._target:
            return  # it is not needed any more
        self._add()
        await self.on_change("started")

    async def _strike(
        self, name: str, every_s: float, end: Callable[[SimulatedWorker], Coroutine[Any, Any, None]]
    ) -> None:
        """Ends workers at random, each after `every_s` seconds on the average."""
        while True:
            await asyncio.sleep(self._random.expovariate(max(1, len(self._roster)) / every_s))
            if self.workers:
                self.events[name] += 1
                self._spawn(end(self._random.choice(self.workers)))

    async def _kill(self, worker: SimulatedWorker) -> None:
        if worker in self._roster:
            self._roster.remove(worker)
        worker.die()
        await self._start_later()

    async def _preempt(self, worker: SimulatedWorker) -> None:
        """With notice: it gets nothing new, and another is started at once."""
        self._roster.remove(worker)
        self._spawn(self._start_later())
        await asyncio.sleep(self._cluster.notice_s)
        worker.die()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def stop(self) -> None:
        for task in self._background:
            task.cancel()


class SimulatedScorers:
    """Replicas of the reward model and the reference in one: first come, first served."""

    def __init__(self, cluster: Cluster, work: Workload) -> None:
        self._score_s = cluster.score_s
        self._free_at = [0.0] * cluster.score_replicas
        self._bad_fraction = work.bad_fraction
        self._random = random.Random(f"scorers/{work.seed}")

    async def score(self, prompt: Prompt, response: str) -> tuple[float, dict[str, float], str]:
        if self._score_s:
            done_at = max(now(), heapq.heappop(self._free_at)) + self._score_s
            heapq.heappush(self._free_at, done_at)
            await asyncio.sleep(done_at - now())
        if self._random.random() < self._bad_fraction:
            raise BadSample("simulated")
        return 1.0, {"simulated": 1.0}, "simulated"

    async def logprobs(self, prompt_tokens: Sequence[int], response_tokens: Sequence[int]) -> list[float]:
        return [-1.0] * len(response_tokens)


class SimulatedLearner:
    """Takes its time for a step and for a publication."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def step(self, samples: Sequence[ScoredRollout], *, training_version: int) -> dict[str, float]:
        await asyncio.sleep(self._cluster.learn_s)
        return {}

    async def publish(self, version: int) -> tuple[WeightsUpdate, list[object]]:
        await asyncio.sleep(self._cluster.publish_s)
        size = int(self._cluster.weights_bytes)
        return WeightsUpdate(version, version - 1, size, digest="", dense_bytes=size), []

    async def save(self, folder: Path) -> None:
        """There is nothing to keep."""

    def checkpointed(self, step: int, state: Path) -> None:
        """Nor to replay."""


class SimulatedLog:
    """Counts what is trained on; nothing in it grows with the run."""

    def __init__(self, run_dir: Path, *, max_lag_steps: int) -> None:
        self.run_dir = run_dir
        self._max_lag_steps = max_lag_steps
        self.lags: Counter[int] = Counter()
        self.stale_tokens = 0
        self.tokens = 0
        self.after_step: Callable[[Mapping[str, Any]], None] = lambda row: None

    def experience(self, step: int, batch: Sequence[ScoredRollout], state: Mapping[str, Any]) -> None:
        for sample in batch:
            ages = [step - 1 - version for version in sample.rollout.weights_versions]
            self.lags[max(ages)] += 1
            self.tokens += len(ages)
            self.stale_tokens += sum(age > self._max_lag_steps for age in ages)

    def metrics(self, row: Mapping[str, Any]) -> None:
        self.after_step(row)

    def quarantine(self, **row: Any) -> None:
        """The lease book counts it."""

    def event(self, event: Event) -> None:
        """The book and `SimulatedPool.events` count those."""


class Silent:
    """Shows nothing of a run."""

    def waiting(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, row: Mapping[str, Any]) -> None: ...
    def workers(self, counts: WorkerCounts) -> None: ...
