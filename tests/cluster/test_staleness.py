"""The staleness bound under random schedules: the real coroutines, job, lease book and queue on simulated engines.

Everything runs on asyncio in virtual time, so that a schedule of an hour takes milliseconds, and a deadlock shows as
a schedule that can never go on.

The expectation is kept apart from the code under test: each sample carries the true versions of the engine that
sampled it, and each trajectory id its fate, learnt where the fate shows: in the log, or as a late answer.
"""

import asyncio
import json
import random
from collections import Counter

import pytest

from cluster import resume, train
from cluster.leases import LeaseBook
from cluster.resume import Resumption
from cluster.simulate import Simulation
from cluster.simulated import Cluster, Workload
from cluster.virtual_time import VirtualTime
from contracts.waiting import NoAnswer
from learner.experience_queue import StalenessBound

NUM_STEPS = 10
NUM_SCHEDULES = 80  # for each lag and group size
SECONDS_ENOUGH = 100_000.0  # virtual; a schedule takes some thousands


class TooOld(AssertionError):
    """A response was trained on with a larger lag than allowed."""


def schedule(seed, *, max_lag_steps, group_size, stale_tokens="expire"):
    """One random schedule."""
    draw = random.Random(f"{seed}/{max_lag_steps}/{group_size}")
    pick = draw.choice
    batch_size = pick([1, 2, 4]) * group_size
    num_actors = pick([1, 2, 3])
    cluster = Cluster(
        actors=num_actors,
        slots=pick([1, 2, 8]) * group_size,
        response_s=5.5,
        response_spread=0.8,
        straggler_fraction=0.05,
        slow_fraction=0.3,
        burst_s=pick([0.0, 10.0]),
        learn_s=pick([0.0, 1.0, 30.0]),
        publish_s=pick([0.01, 2.0]),
        weights_bytes=0.0,
        latency_s=pick([0.0, 1.0]),
        apply_s=pick([0.0, 1.0]),
        update_jitter_s=pick([0.0, 1.0, 20.0, 60.0]),
        score_s=pick([0.0, 0.1, 3.0]),
        score_replicas=pick([1, 8]),
        death_every_s=num_actors * pick([20.0, 100.0, 1e9]),
        preemption_every_s=num_actors * pick([100.0, 1e9, 1e9]),
        notice_s=10.0,
        restart_s=pick([1.0, 20.0]),
    )
    work = Workload(
        steps=NUM_STEPS,
        batch_size=batch_size,
        group_size=group_size,
        max_lag_steps=max_lag_steps,
        stale_tokens=stale_tokens,
        queue_samples=pick([batch_size, batch_size + 1, 100 * batch_size]),
        queue_bytes=pick([1, 2000, 1 << 30]),
        lease_s=pick([70.0, 150.0, 1000.0]),
        bad_fraction=pick([0.0, 0.0, 0.1]),
        checkpoint_every_steps=pick([2, 3]),
        seed=seed,
    )
    return cluster, work


class WatchedBook(LeaseBook):
    """The lease book, and what it is told."""

    watch: "Watch"

    def issue(self, prompt, *, version, actor_id):
        lease = super().issue(prompt, version=version, actor_id=actor_id)
        self.watch.issued(lease)
        return lease

    def reissue(self, lease, *, version, actor_id):
        self.watch.events["reissue"] += 1
        return super().reissue(lease, version=version, actor_id=actor_id)

    def expire(self, lease):
        super().expire(lease)
        self.watch.expired(lease)


class Watch:
    """The fate of every id, over the lives of a run that is interrupted; and what must hold at all times."""

    def __init__(self, max_lag_steps):
        self.max_lag_steps = max_lag_steps
        self.fates = {}
        self.late = set()
        self.lags = []
        self.events: Counter[str] = Counter()

    def attach(self, simulation):
        """Watch one life of the run."""
        self.job = job = simulation.job
        job.leases.__class__ = WatchedBook
        job.leases.watch = self
        generate, experience, quarantine = job.pool.generate, job.log.experience, job.log.quarantine

        async def generate_in_time(worker, request, *, deadline_s):
            try:
                return await generate(worker, request, deadline_s=deadline_s)
            except NoAnswer:
                self.late.add(request.group_id)
                raise

        def log_experience(step, samples, state):
            experience(step, samples, state)
            for sample in samples:
                self.trained(step, sample)
            # What a kill after this brings back: what is trained or bad, and nothing of what is open.
            self.logged_fates = {trajectory: _closed(fate) for trajectory, fate in self.fates.items()}
            self.logged = Resumption(None, step, step, json.loads(json.dumps(state)))

        def log_quarantine(*, trajectory_id, **row):
            quarantine(trajectory_id=trajectory_id, **row)
            self.ends(trajectory_id, "quarantined")

        job.pool.generate, job.log.experience, job.log.quarantine = generate_in_time, log_experience, log_quarantine
        job.log.after_step = lambda row: self.audit()

    def issued(self, lease):
        for trajectory in lease.trajectory_ids:
            assert trajectory not in self.fates, f"{trajectory} is issued twice"
            self.fates[trajectory] = "open"
        self.audit()

    def expired(self, lease):
        assert lease.group_id in self.late, f"{lease.group_id} expired in time"
        for trajectory in lease.trajectory_ids:
            if self.fates[trajectory] == "open":
                self.ends(trajectory, "expired")

    def trained(self, step, sample):
        self.ends(sample.rollout.trajectory_id, "trained")
        lag = step - 1 - min(sample.rollout.weights_versions)
        self.lags.append(lag)
        if lag > self.max_lag_steps:
            raise TooOld(f"{sample.rollout.trajectory_id}: lag {lag}, allowed {self.max_lag_steps}")

    def ends(self, trajectory, fate):
        assert self.fates[trajectory] == "open", f"{trajectory} was {self.fates[trajectory]}, and now {fate}"
        self.fates[trajectory] = fate
        self.events[fate] += 1

    def audit(self):
        """Every id that was ever issued has one fate, and the book counts the same."""
        counts, fates = self.job.leases.counts, Counter(self.fates.values())
        assert counts.issued == len(self.fates)
        assert (counts.trained, counts.expired) == (fates["trained"], fates["expired"])
        assert (counts.quarantined, counts.dropped, counts.open) == (fates["quarantined"], 0, fates["open"])

    def remember(self):
        """What a checkpoint of this moment may bring back: what is queued, and the fates that were final."""
        queued = {sample.rollout.trajectory_id for group in self.job.queue.groups for sample in group.samples}
        self.saved = {
            trajectory: fate if trajectory in queued else _closed(fate) for trajectory, fate in self.fates.items()
        }

    def go_back(self, found):
        """The run has ended without a word and goes on from its checkpoint, or from the end of its log."""
        self.fates = dict(self.saved if found.checkpoint else self.logged_fates)
        self.events["resume" if found.checkpoint else "replay"] += 1


def _closed(fate):
    return "expired" if fate == "open" else fate


async def one_life(cluster, work, watch, folder, *, found=None, until=NUM_STEPS):
    """The run from `found` on, until it is killed after step `until`; returns its last checkpoint."""
    async with asyncio.TaskGroup() as tasks:
        version = found.last_logged if found else 0
        simulation = Simulation(cluster, work, tasks, folder, version=version)
        watch.attach(simulation)
        job = simulation.job
        if found is not None:
            resume.restore(job, found, simulation.prompts)
            watch.go_back(found)
            watch.audit()
        save = job.learner.save

        async def save_and_remember(path):
            watch.remember()
            await save(path)

        simulation.learner.save = save_and_remember  # type: ignore[method-assign]
        simulation.log.after_step = lambda row: job.stopping.set() if job.version == until else watch.audit()
        await simulation.run()
        assert job.version == until
        watch.audit()
        watch.events += simulation.pool.events
    saved = job.last_checkpoint
    if saved is None:
        return None
    state = json.loads((saved.state / "run.json").read_text(encoding="utf-8"))
    return Resumption(saved, saved.step, saved.step, state)


def simulate(cluster, work, folder, *, max_lag_steps, killed_after=None, from_log=False):
    """Run one schedule to its end, killed and resumed in between where that is asked for.

    Resumed at its last checkpoint, as if no batch had been logged since, or after its last logged batch.
    """

    async def to_the_end():
        watch = Watch(max_lag_steps)
        try:
            async with asyncio.timeout(SECONDS_ENOUGH):
                found = None
                if killed_after is not None:
                    found = await one_life(cluster, work, watch, folder, until=killed_after)
                    found = watch.logged if from_log else found
                await one_life(cluster, work, watch, folder, found=found)
        except BaseExceptionGroup as group:
            raise next(error for error in _leaves(group) if not isinstance(error, asyncio.CancelledError)) from None
        except TimeoutError:
            job = watch.job
            state = f"{job.queue.started()=} {job.leases.running()=} {job.choosing=}"
            raise AssertionError(f"no progress: {cluster} {work} {state} {watch.events}") from None
        return watch

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(to_the_end())


def _leaves(group):
    for error in group.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]


@pytest.fixture(autouse=True)
def never_looks_again(monkeypatch):
    """The learner does not look again by itself: a lost wake-up is a deadlock here."""
    monkeypatch.setattr(train, "_LOOK_AGAIN_S", 10 * SECONDS_ENOUGH)


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("max_lag_steps", range(5))
def test_no_response_grows_too_old_and_every_run_gets_done(tmp_path, max_lag_steps, group_size):
    events: Counter[str] = Counter()
    lags: list[int] = []
    for seed in range(NUM_SCHEDULES):
        cluster, work = schedule(seed, max_lag_steps=max_lag_steps, group_size=group_size)
        killed_after = None if seed % 4 else 4 + seed % 3
        folder = tmp_path / str(seed)
        from_log = seed % 8 == 0
        watch = simulate(
            cluster, work, folder, max_lag_steps=max_lag_steps, killed_after=killed_after, from_log=from_log
        )
        events += watch.events
        lags += watch.lags
    # The bound is used, not avoided; and what the schedules are for did happen.
    assert max(lags) == max_lag_steps
    wanted = ("trained", "expired", "quarantined", "death", "preemption", "reissue", "resume", "replay")
    assert min(events[name] for name in wanted) > 0, events


def first_broken(folder, *, max_lag_steps, seeds=60):
    """The first seed whose schedule trains on a response that is too old."""
    for seed in range(seeds):
        cluster, work = schedule(seed, max_lag_steps=max_lag_steps, group_size=1)
        try:
            simulate(cluster, work, folder / str(seed), max_lag_steps=max_lag_steps)
        except TooOld:
            return seed
    return None


@pytest.mark.parametrize("max_lag_steps", [0, 1, 3])
def test_without_admission_and_without_waiting_the_check_fails(tmp_path, monkeypatch, max_lag_steps):
    monkeypatch.setattr(LeaseBook, "oldest_start", lambda *args, **kwargs: 0)
    monkeypatch.setattr(StalenessBound, "holds_after", lambda *args, **kwargs: True)
    assert first_broken(tmp_path, max_lag_steps=max_lag_steps) is not None


def test_admission_alone_lets_stragglers_grow_too_old(tmp_path, monkeypatch):
    # DESIGN.md, "How experience flows" 4: counting admissions does not bound the lag.
    monkeypatch.setattr(StalenessBound, "holds_after", lambda *args, **kwargs: True)
    assert first_broken(tmp_path, max_lag_steps=1) is not None


@pytest.mark.parametrize("max_lag_steps", [0, 1, 3])
def test_where_old_tokens_are_masked_every_run_gets_done_and_nothing_is_lost(tmp_path, max_lag_steps):
    lags = []
    for seed in range(NUM_SCHEDULES // 2):
        cluster, work = schedule(seed, max_lag_steps=max_lag_steps, group_size=4, stale_tokens="mask")
        lags += simulate(cluster, work, tmp_path / str(seed), max_lag_steps=10**9).lags
    # At 0 nothing starts before the newest weights are out and everything is waited for; above, the mask is needed.
    assert (max(lags) > max_lag_steps) == (max_lag_steps > 0)


def test_a_deadlock_is_found():
    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=VirtualTime) as runner, pytest.raises(AssertionError, match="deadlock"):
        runner.run(waits_for_ever())
