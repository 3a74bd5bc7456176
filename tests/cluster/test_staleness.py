"""The staleness bound under random schedules: the real lease book and queue, engines that are simulated.

Everything runs on asyncio in virtual time: the clock jumps to the next timer as soon as nothing else can go on, so
that a schedule of an hour takes milliseconds, and a deadlock shows as a schedule that can never go on.

The expectation is kept apart from the code under test: each sample remembers the true versions of the engine that
sampled it, and each trajectory id its fate.
"""

import asyncio
import random
import selectors
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.leases import Lease, LeaseBook
from contracts.records import Prompt, ScoredRollout
from learner.experience_queue import ExperienceQueue, ScoredGroup, StalenessBound
from tests.rollouts import scored_rollout

NUM_STEPS = 10
NUM_SCHEDULES = 80  # for each lag and group size
SECONDS_ENOUGH = 100_000.0  # virtual; a schedule takes some thousands


class TooOld(AssertionError):
    """A response was trained on with a larger lag than allowed."""


class WorkerLost(Exception):
    """The engine died; stands for actors.pool.WorkerLost."""


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


@dataclass
class Schedule:
    """One random schedule."""

    seed: int
    max_lag_steps: int
    group_size: int

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed}/{self.max_lag_steps}/{self.group_size}")
        pick = self.random.choice
        self.groups_per_batch = pick([1, 2, 4])
        self.num_engines = pick([1, 2, 3])
        self.room_per_engine = pick([1, 2, 8]) * self.group_size
        self.speeds = [pick([1.0, 1.0, 0.2]) for _ in range(self.num_engines)]  # some actors are slow
        self.learn_s = pick([0.0, 1.0, 30.0])
        self.load_s = pick([0.0, 1.0, 20.0, 60.0])  # engines take new weights up to this late, each at its own time
        self.publish_waits = pick([True, False])  # for the slowest engine
        self.death_every_s = pick([20.0, 100.0, 1e9])
        self.lease_s = pick([70.0, 150.0, 1000.0])  # stragglers take 20 to 1000 s
        self.bad_fraction = pick([0.0, 0.0, 0.1])
        batch_samples = self.groups_per_batch * self.group_size
        self.queue_samples = pick([batch_samples, batch_samples + 1, 100 * batch_samples])
        self.queue_bytes = pick([1, 2000, 1 << 30])
        self.burst = pick([False, True])  # responses finish on the full ten seconds, many at a time

    def response_s(self, speed: float) -> float:
        seconds = self.random.uniform(1, 10) / speed
        if self.random.random() < 0.05:
            seconds *= 20
        return 10 * round(seconds / 10 + 0.5) if self.burst else seconds


@dataclass(eq=False)
class Engine:
    """`version` is the truth, `known_version` what the driver has been told; requests fail when `died` is set."""

    name: str
    speed: float
    version: int
    known_version: int
    running: int = 0
    died: asyncio.Event = field(default_factory=asyncio.Event)


class Simulation:
    """The coroutines of cluster/train.py around the real lease book and queue."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.random = schedule.random
        bound = StalenessBound(schedule.max_lag_steps, schedule.groups_per_batch)
        self.groups_per_batch = schedule.groups_per_batch
        self.leases = LeaseBook(bound, schedule.group_size)
        self.queue = ExperienceQueue(bound, max_samples=schedule.queue_samples, max_bytes=schedule.queue_bytes)
        self.engines: list[Engine] = []
        self.version = self.choosing = 0
        self.newest = 0  # published or about to be
        self.pending: list[Prompt] = []
        self.changed = asyncio.Condition()
        self.fate: dict[str, str] = {}
        self.lags: list[int] = []
        self.events: Counter[str] = Counter()
        self.num_engines_started = 0
        self.spawned: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        for speed in self.schedule.speeds:
            self.start_engine(speed)
        async with asyncio.timeout(SECONDS_ENOUGH), asyncio.TaskGroup() as self.tasks:
            self.spawn(self.collect())
            self.spawn(self.kill_engines())
            for _ in range(NUM_STEPS):
                await self.learn()
            for task in self.spawned:
                task.cancel()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.tasks.create_task(coroutine)
        self.spawned.add(task)
        task.add_done_callback(self.spawned.discard)
        return task

    # What happens to engines.

    def start_engine(self, speed: float) -> None:
        name = f"engine-{self.num_engines_started}"
        self.num_engines_started += 1
        self.engines.append(Engine(name, speed, self.newest, self.newest))

    async def kill_engines(self) -> None:
        while True:
            await asyncio.sleep(self.random.expovariate(1 / self.schedule.death_every_s))
            if self.engines:
                self.spawn(self.kill(self.random.choice(self.engines)))

    async def kill(self, engine: Engine) -> None:
        self.events["death"] += 1
        self.engines.remove(engine)
        engine.died.set()
        await asyncio.sleep(self.random.uniform(0, 20))
        self.start_engine(engine.speed)
        await self.notify()

    async def load_weights(self, engine: Engine, version: int) -> None:
        await asyncio.sleep(self.random.uniform(0, self.schedule.load_s))
        engine.version = max(engine.version, version)
        await asyncio.sleep(self.random.uniform(0, 1))
        engine.known_version = max(engine.known_version, version)
        await self.notify()

    async def sample(self, engine: Engine, lease: Lease, trajectory: str) -> ScoredRollout | None:
        """One response with the engine's true versions; None if it is bad."""
        engine.running += 1
        try:
            versions = [engine.version]
            response_s = self.schedule.response_s(engine.speed)
            finished = asyncio.create_task(asyncio.sleep(response_s))
            dead = asyncio.create_task(engine.died.wait())
            try:
                async with asyncio.timeout(self.schedule.lease_s):
                    await asyncio.wait([finished, dead], return_when=asyncio.FIRST_COMPLETED)
            finally:
                finished.cancel()
                dead.cancel()
            if engine.died.is_set():
                raise WorkerLost(engine.name)
            versions.append(engine.version)
        finally:
            engine.running -= 1
        await self.notify()
        if self.random.random() < self.schedule.bad_fraction:
            self.leases.quarantine(lease)
            self.ends(trajectory, "quarantined")
            await self.notify()
            return None
        return scored_rollout(trajectory, response=(7, 8), versions=versions, group_id=lease.group_id)

    # What the driver does: as cluster/train.py and cluster/launch.py.

    async def notify(self) -> None:
        self.audit()
        async with self.changed:
            self.changed.notify_all()
        await self.queue.notify()

    def free(self) -> Engine | None:
        limit = self.schedule.room_per_engine
        with_room = [engine for engine in self.engines if engine.running + self.schedule.group_size <= limit]
        return min(with_room, key=lambda engine: engine.running, default=None)

    async def collect(self) -> None:
        while True:
            async with self.changed:
                while True:
                    engine = self.free()
                    wanted = self.leases.open_groups < (NUM_STEPS - self.choosing) * self.groups_per_batch
                    if (
                        engine
                        and wanted
                        and self.leases.may_start(engine.known_version, training_version=self.choosing)
                    ):
                        break
                    await self.changed.wait()
            prompt = self.pending.pop(0) if self.pending else Prompt("p", [1], "q", [])
            lease = self.leases.issue(prompt, version=engine.known_version, actor_id=engine.name)
            for trajectory in lease.trajectory_ids:
                assert trajectory not in self.fate, f"{trajectory} is issued twice"
                self.fate[trajectory] = "open"
            self.audit()
            self.spawn(self.collect_group(lease, engine))
            await asyncio.sleep(0)  # the group's requests reach the engine

    async def collect_group(self, lease: Lease, engine: Engine) -> None:
        scored: dict[str, ScoredRollout | None] = {}
        while True:
            missing = [trajectory for trajectory in lease.trajectory_ids if trajectory not in scored]
            outcomes = await asyncio.gather(
                *(self.sample(engine, lease, trajectory) for trajectory in missing), return_exceptions=True
            )
            errors = []
            for trajectory, outcome in zip(missing, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    errors.append(outcome)
                else:
                    scored[trajectory] = outcome
            if any(isinstance(error, TimeoutError) for error in errors):
                self.leases.expire(lease)
                self.pending.append(lease.prompt)
                for trajectory in lease.trajectory_ids:
                    if self.fate[trajectory] == "open":
                        self.ends(trajectory, "expired")
                return await self.notify()
            if not errors:
                break
            assert all(isinstance(error, WorkerLost) for error in errors), errors
            self.events["reissue"] += 1
            async with self.changed:
                while (other := self.free()) is None or other.known_version < lease.started_version:
                    await self.changed.wait()
            engine = other
            lease = self.leases.reissue(lease, version=engine.known_version, actor_id=engine.name)
            self.audit()
        good = tuple(sample for sample in scored.values() if sample is not None)
        if good:
            assert await self.queue.put(ScoredGroup(lease.group_id, lease.started_version, good))
            self.leases.queued(lease)
        return await self.notify()

    async def learn(self) -> None:
        while True:
            batch = self.queue.ready(self.leases.running(), training_version=self.version)
            if batch is not None:
                break
            # Never looks again by itself: a lost wake-up is a deadlock here.
            await self.queue.wait_changed(timeout_s=10 * SECONDS_ENOUGH)
        await self.queue.remove(batch)
        self.choosing = self.version + 1
        await self.notify()
        assert len(batch) == self.groups_per_batch
        self.leases.trained(batch)
        for group in batch:
            for sample in group.samples:
                self.ends(sample.rollout.trajectory_id, "trained")
                lag = self.version - min(sample.rollout.weights_versions)
                self.lags.append(lag)
                if lag > self.schedule.max_lag_steps:
                    raise TooOld(f"{sample.rollout.trajectory_id}: lag {lag}, allowed {self.schedule.max_lag_steps}")
        self.audit()
        await asyncio.sleep(self.schedule.learn_s)
        self.newest = self.version + 1
        loads = [self.spawn(self.load_weights(engine, self.newest)) for engine in self.engines]
        if self.schedule.publish_waits:
            await asyncio.gather(*loads)
        self.version = self.choosing = self.newest
        await self.notify()

    # What must hold.

    def ends(self, trajectory: str, fate: str) -> None:
        assert self.fate[trajectory] == "open", f"{trajectory} was {self.fate[trajectory]}, and now {fate}"
        self.fate[trajectory] = fate
        self.events[fate] += 1

    def audit(self) -> None:
        """Every id that was ever issued has one fate, and the book counts the same."""
        counts, fates = self.leases.counts, Counter(self.fate.values())
        assert counts.issued == len(self.fate)
        assert (counts.trained, counts.expired) == (fates["trained"], fates["expired"])
        assert (counts.quarantined, counts.open) == (fates["quarantined"], fates["open"])


def simulate(schedule: Schedule) -> Simulation:
    """Run one schedule to its end."""

    async def to_the_end() -> Simulation:
        simulation = Simulation(schedule)
        try:
            await simulation.run()
        except BaseExceptionGroup as group:
            raise next(error for error in _leaves(group) if not isinstance(error, asyncio.CancelledError)) from None
        except TimeoutError:
            state = f"{simulation.queue.started()=} {simulation.leases.running()=} {simulation.choosing=}"
            raise AssertionError(f"no progress: {schedule} {state} {simulation.events}") from None
        return simulation

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(to_the_end())


def _leaves(group):
    for error in group.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("max_lag_steps", range(5))
def test_no_response_grows_too_old_and_every_run_gets_done(max_lag_steps, group_size):
    events: Counter[str] = Counter()
    lags = []
    for seed in range(NUM_SCHEDULES):
        simulation = simulate(Schedule(seed, max_lag_steps, group_size))
        assert simulation.version == NUM_STEPS
        events += simulation.events
        lags += simulation.lags
    # The bound is used, not avoided; and what the schedules are for did happen.
    assert max(lags) == max_lag_steps
    assert min(events[name] for name in ("trained", "expired", "quarantined", "death", "reissue")) > 0, events


def first_broken(*, max_lag_steps, seeds=60):
    """The first seed whose schedule trains on a response that is too old."""
    for seed in range(seeds):
        try:
            simulate(Schedule(seed, max_lag_steps, group_size=1))
        except TooOld:
            return seed
    return None


@pytest.mark.parametrize("max_lag_steps", [0, 1, 3])
def test_without_admission_and_without_waiting_the_check_fails(monkeypatch, max_lag_steps):
    monkeypatch.setattr(LeaseBook, "may_start", lambda *args, **kwargs: True)
    monkeypatch.setattr(StalenessBound, "holds_after", lambda *args, **kwargs: True)
    assert first_broken(max_lag_steps=max_lag_steps) is not None


def test_admission_alone_lets_stragglers_grow_too_old(monkeypatch):
    # DESIGN.md, "How experience flows" 4: counting admissions does not bound the lag.
    monkeypatch.setattr(StalenessBound, "holds_after", lambda *args, **kwargs: True)
    assert first_broken(max_lag_steps=1) is not None


def test_a_deadlock_is_found():
    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=VirtualTime) as runner, pytest.raises(AssertionError, match="deadlock"):
        runner.run(waits_for_ever())
