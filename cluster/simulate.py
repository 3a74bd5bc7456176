"""A run in virtual time: the real scheduling around engines, replicas and a learner that only take their time.

    python -m cluster.simulate --actors 64 --slots 64 --response-s 20 --learn-s 30 --batch-size 512 --max-lag-steps 2

The coroutines of cluster/train.py, the job, the lease book and the queue are the real ones. Simulated are the parts
that compute: they answer after the time that the parameters say. The clock jumps to the next timer as soon as nothing
else can go on, so hours of a cluster of thousands of actors take seconds, and a deadlock shows as one.

What is left out: an engine's speed does not depend on how many of its slots are taken, every engine takes weights at
the speed of its own link (object store copies spread from holder to holder), and deciding takes no virtual time.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import math
import random
import selectors
import statistics
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from actors.pool import WorkerLost
from actors.prompts import PromptStream
from actors.reward import BadSample
from actors.rollout import RolloutRequest
from actors.roster import Roster
from cluster import train
from cluster.autoscale import Limits, Load, target_workers
from cluster.job import Job
from cluster.leases import LeaseBook
from cluster.metrics import StepClock
from contracts.clock import BusyClock, now
from contracts.config import Config, validate
from contracts.records import Prompt, Rollout, ScoredRollout, WeightsUpdate
from contracts.stopping import StopRequest
from contracts.waiting import answer
from learner.experience_queue import ExperienceQueue, StalenessBound

_NUM_PROMPTS = 64
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
    max_actors: int = 4096

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


@dataclass(frozen=True)
class Ideal:
    """Upper bounds of the throughput, samples a second."""

    generation: float
    learning: float
    staleness: float

    @property
    def samples_per_s(self) -> float:
        return min(self.generation, self.learning, self.staleness)

    @property
    def limit(self) -> str:
        return min(("generation", "learning", "staleness"), key=lambda name: float(getattr(self, name)))


def ideal(cluster: Cluster, work: Workload) -> Ideal:
    """What no schedule can exceed: N * r, B / L and the staleness bound's limit (S + 1) * B / (L + W).

    N actors make r = slots / mean response each. The learner takes L = learn + publish seconds for B samples.
    The third: version m is out L after batch m - 1 is chosen. Groups that start at version n are consumed by batch
    n + S at the latest, so batch n + S is chosen no earlier than W after version n is out, that is L + W after batch
    n - 1: S + 1 batches take at least L + W. W is the time from a version's publication until what starts on it is
    scored: the weights' way into an engine plus the response and its score; of the slowest of B responses where all
    must be in time (`expire`), of a mean one where late ones may train later (`mask`: by Little's law (S + 1) * B
    places hold a sample for W on the average and wait, a batch at a time, while the learner works). Where a group is
    larger than an engine's slots, its responses take turns there and the third bound is out of reach.
    """
    arrive_s = 2 * cluster.latency_s + cluster.weights_bytes / cluster.bandwidth + cluster.apply_s
    response_s = cluster.mean_response_s if work.stale_tokens == "mask" else _slowest_of(work.batch_size, cluster)
    learn_s, wait_s = cluster.learn_s + cluster.publish_s, arrive_s + response_s + cluster.score_s
    num_actors = cluster.max_actors if cluster.autoscale else cluster.actors
    return Ideal(
        generation=num_actors * cluster.actor_samples_per_s,
        learning=work.batch_size / learn_s if learn_s else math.inf,
        staleness=(work.max_lag_steps + 1) * work.batch_size / (learn_s + wait_s),
    )


def _slowest_of(num_responses: int, cluster: Cluster, num_draws: int = 64) -> float:
    """Mean over draws of the longest of `num_responses` responses, on actors of ordinary speed."""
    draw = random.Random(0)
    return statistics.fmean(
        max(response_seconds(cluster, draw) for _ in range(num_responses)) for _ in range(num_draws)
    )


def response_seconds(cluster: Cluster, draw: random.Random) -> float:
    seconds = cluster.response_s * (1 + cluster.response_spread * draw.uniform(-1, 1))
    return seconds * cluster.straggler_factor if draw.random() < cluster.straggler_fraction else seconds


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        selector = selectors.DefaultSelector()
        super().__init__(selector)
        self._now = 0.0
        poll = selector.select

        def jump(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is None:
                raise AssertionError("deadlock: nothing can go on and no timer is set")
            self._now += max(0.0, timeout)
            return poll(0)

        selector.select = jump  # type: ignore[method-assign]

    def time(self) -> float:
        return self._now


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

    def resize(self, num_workers: int) -> None:
        """Start workers, or let some finish what they have and leave."""
        for _ in range(num_workers - len(self._roster) - self._starting):
            self._spawn(self._start_later())
        for worker in self.workers[num_workers:]:
            self._roster.remove(worker)

    @property
    def size(self) -> int:
        return len(self._roster) + self._starting

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

    def experience(self, step: int, batch: Sequence[ScoredRollout]) -> None:
        for sample in batch:
            ages = [step - 1 - version for version in sample.rollout.weights_versions]
            self.lags[max(ages)] += 1
            self.tokens += len(ages)
            self.stale_tokens += sum(age > self._max_lag_steps for age in ages)

    def metrics(self, row: Mapping[str, Any]) -> None:
        self.after_step(row)

    def quarantine(self, **row: Any) -> None:
        """The lease book counts it."""


class Silent:
    """Shows nothing of a run."""

    def waiting(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, row: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Result:
    """What a simulated run came to. Rates and shares of time are those of its steady part: the first steps, while the
    pipeline fills, and the last, for which nothing more is started, are left out."""

    seconds: float  # all of it, virtual
    samples_per_s: float
    occupied_slots_fraction: float
    rollout_idle_fraction: float
    learner_busy_fraction: float
    queue_blocked_s: float  # a step, summed over producers
    queued_samples: float  # mean at the end of a step
    paused_s: float  # a step, the largest over engines
    workers: float  # mean
    lags: dict[int, int]
    stale_token_fraction: float
    counts: dict[str, int]
    events: dict[str, int]


class Simulation:
    """One run, from its start or from a checkpoint, to its last step or to `stopping`."""

    def __init__(
        self,
        cluster: Cluster,
        work: Workload,
        tasks: asyncio.TaskGroup,
        folder: Path,
        *,
        version: int = 0,
        prompt_tokens: int = 1,
    ) -> None:
        self.cluster, self.work, self.tasks = cluster, work, tasks
        bound = StalenessBound(work.max_lag_steps, work.batch_size // work.group_size, work.stale_tokens)
        config = configuration(work, folder)
        self.log = SimulatedLog(folder, max_lag_steps=work.max_lag_steps)
        self.log.after_step = self._measure
        self._sums: Counter[str] = Counter()
        self._slot_seconds = 0.0
        self.pool = SimulatedPool(cluster, tasks, seed=work.seed, version=version)
        self.prompts = [Prompt(f"p{number}", [1] * prompt_tokens, "", []) for number in range(_NUM_PROMPTS)]
        scorers: Any = SimulatedScorers(cluster, work)
        self.learner = SimulatedLearner(cluster)
        parts: dict[str, Any] = {"pool": self.pool, "learner": self.learner, "log": self.log}
        self.job = Job(
            config=config,
            run_id="simulation",
            prompts=PromptStream(self.prompts, seed=work.seed),
            eval_prompts=[],
            rewards=scorers,
            judges=scorers,
            reference=scorers,
            queue=ExperienceQueue(bound, max_samples=config.queue_samples, max_bytes=work.queue_bytes),
            leases=LeaseBook(bound, work.group_size),
            progress=Silent(),  # type: ignore[arg-type]
            stopping=StopRequest(),
            version=version,
            choosing=version,
            **parts,
        )
        self.pool.on_change = lambda event: self.job.notify()

    async def run(self) -> None:
        """As `cluster.train.run`, with nothing before the first step and nothing after the last."""
        self.pool.start()
        background = [
            self.tasks.create_task(train.collect(self.job)),
            self.tasks.create_task(train.raise_pool_failure(self.job)),
        ]
        clock = StepClock(self.job)
        while self.job.version < self.work.steps and not self.job.stopping.is_set():
            await train.learn(self.job, clock)
        for task in background:
            task.cancel()
        self.pool.stop()

    def result(self) -> Result:
        sums, counts = self._sums, self.job.leases.counts
        step_s, steps = sums["step_s"] or math.nan, sums["steps"] or math.nan
        return Result(
            seconds=now(),
            samples_per_s=sums["samples"] / step_s,
            occupied_slots_fraction=sums["slot_s"] / (sums["worker_s"] * self.cluster.slots or math.nan),
            rollout_idle_fraction=sums["idle_s"] / step_s,
            learner_busy_fraction=sums["learn_s"] / step_s,
            queue_blocked_s=sums["queue_blocked_s"] / steps,
            queued_samples=sums["queued"] / steps,
            paused_s=sums["generation_paused_s"] / steps,
            workers=sums["worker_s"] / step_s,
            lags=dict(sorted(self.log.lags.items())),
            stale_token_fraction=self.log.stale_tokens / max(1, self.log.tokens),
            counts={**vars(counts), "open": counts.open},
            events=dict(self.pool.events),
        )

    def _measure(self, row: Mapping[str, Any]) -> None:
        """After every step. The steady part is whole rounds of S + 1 steps, which come in bursts."""
        slot_s = self.pool.slot_seconds - self._slot_seconds
        self._slot_seconds = self.pool.slot_seconds
        taken = slot_s / (max(1, len(self.pool.workers)) * self.cluster.slots * row["step_s"])
        round_steps = self.work.max_lag_steps + 1
        edge = min(self.work.steps // 3, round_steps + 1)
        steady = max(1, (self.work.steps - 2 * edge) // round_steps * round_steps)
        if edge < row["step"] <= edge + steady:
            step_s = row["step_s"]
            for name in ("step_s", "learn_s", "samples", "queue_blocked_s", "generation_paused_s"):
                self._sums[name] += row[name]
            self._sums["steps"] += 1
            self._sums["slot_s"] += slot_s  # type: ignore[assignment]
            self._sums["worker_s"] += len(self.pool.workers) * step_s
            self._sums["idle_s"] += row["rollout_idle_fraction"] * step_s
            self._sums["queued"] += self.job.queue.num_samples
        if self.cluster.autoscale:
            self._resize(row, free_places_fraction=max(0.0, 1 - taken))

    def _resize(self, row: Mapping[str, Any], *, free_places_fraction: float) -> None:
        """After every step, as cluster/train.py would."""
        load = Load(
            workers=self.pool.size,
            free_places_fraction=free_places_fraction,
            learner_wait_fraction=row["wait_s"] / row["step_s"],
            queue_blocked_fraction=min(1.0, row["queue_blocked_s"] / row["step_s"]),
            samples_wanted=(self.work.max_lag_steps + 1) * self.work.batch_size,
            places_per_worker=self.cluster.slots,
        )
        self.pool.resize(target_workers(load, Limits(1, self.cluster.max_actors)))


def configuration(work: Workload, folder: Path) -> Config:
    """The run's configuration, checked as that of a real one."""
    return validate(
        {
            "output_dir": str(folder),
            "model": {"path": "simulated"},
            "prompts": {"path": "simulated"},
            "rewards": [{"name": "simulated", "function": "simulated:reward"}],
            "seed": work.seed,
            "steps": work.steps,
            "training": {"batch_size": work.batch_size, "samples_per_prompt": work.group_size, "minibatches": 1},
            "streaming": {
                "max_lag_steps": work.max_lag_steps,
                "stale_tokens": work.stale_tokens,
                "queue_samples": work.queue_samples,
                "queue_bytes": work.queue_bytes,
                "max_bad_fraction": 1.0,
                "max_attempts": 1 << 30,
            },
            "deadlines": {"lease_s": work.lease_s},
            "checkpoint": {"every_steps": work.checkpoint_every_steps or work.steps + 1},
        },
        source="the simulation",
    )


def simulate(cluster: Cluster, work: Workload) -> Result:
    """Run one to its end, in virtual time.

    Raises:
        ConfigError: the workload is none that a run could have.
        AssertionError: a deadlock.
    """

    async def to_the_end(folder: Path) -> Result:
        async with asyncio.TaskGroup() as tasks:
            simulation = Simulation(cluster, work, tasks, folder)
            await simulation.run()
        return simulation.result()

    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(to_the_end(Path(folder)))


def report(cluster: Cluster, work: Workload, result: Result) -> str:
    """A Markdown table."""
    best = ideal(cluster, work)
    share = result.samples_per_s / best.samples_per_s
    rows = {
        "samples a second": f"{result.samples_per_s:.2f} ({share:.1%} of the ideal {best.samples_per_s:.2f})",
        "ideal: generation, learning, staleness": f"{best.generation:.2f}, {best.learning:.2f}, {best.staleness:.2f}",
        "what limits it": best.limit,
        "slots occupied": f"{result.occupied_slots_fraction:.1%}",
        "actors without any work": f"{result.rollout_idle_fraction:.1%}",
        "learner busy": f"{result.learner_busy_fraction:.1%}",
        "held for new weights, s a step": f"{result.paused_s:.2f}",
        "producers blocked by a full queue, s a step, all together": f"{result.queue_blocked_s:.1f}",
        "queued samples, mean": f"{result.queued_samples:.0f}",
        "lag in steps: samples": ", ".join(f"{lag}: {samples}" for lag, samples in result.lags.items()),
        "tokens too old and masked": f"{result.stale_token_fraction:.2%}",
        "trajectories": ", ".join(f"{number} {fate}" for fate, number in result.counts.items()),
        "struck": ", ".join(f"{number} {name}" for name, number in result.events.items()) or "none",
        "actors, mean": f"{result.workers:.1f}",
        "virtual seconds": f"{result.seconds:.0f}",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for part in (Cluster, Workload):
        group = parser.add_argument_group(part.__name__.lower(), (part.__doc__ or "").splitlines()[0])
        for each in fields(part):
            flag = "--" + each.name.replace("_", "-")
            if each.type == "bool":
                group.add_argument(flag, action="store_true")
            elif each.name == "stale_tokens":
                group.add_argument(flag, choices=["expire", "mask"], default=each.default)
            else:
                kind = float if each.type == "float" else int
                group.add_argument(flag, type=kind, default=each.default, help=f"default: {each.default}")
    given = vars(parser.parse_args())
    cluster = Cluster(**{each.name: given[each.name] for each in fields(Cluster)})
    work = Workload(**{each.name: given[each.name] for each in fields(Workload)})
    print(report(cluster, work, simulate(cluster, work)))


if __name__ == "__main__":
    main()
