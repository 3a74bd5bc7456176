"""The scheduling by itself: simulated throughput against its bounds, and how fast the driver decides.

    python -m benchmarks.scheduling throughput      # 1 to 4,096 simulated actors against the ideal
    python -m benchmarks.scheduling control-plane   # trajectories a second through the real driver, engines that
                                                    # answer at once: in this process, then in 1 and 2 Ray actors
    python -m benchmarks.scheduling memory          # of driver and queue, over a long simulated run
    python -m benchmarks.scheduling autoscale       # work that rises and falls, against each constant number of workers

No model is loaded. Scoring is left out of the control plane's time: rewards come at once. Prints Markdown tables.
"""

# ruff: noqa: E402  Ray reads its environment when it is imported
from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import os
import pstats
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.loopback import stay_on_loopback

stay_on_loopback()

import ray
from transformers import AutoConfig

from actors.delivery import WeightsAnswer
from actors.mailbox import Finished, Mailbox, RolloutRequest, Started
from actors.pool import RolloutPool
from cluster import train
from cluster.metrics import StepClock
from cluster.run_log import RunLog
from cluster.simulate import Simulation, ideal, simulate
from cluster.simulated import Cluster, SimulatedLearner, SimulatedPool, SimulatedWorker, Workload
from cluster.virtual_time import VirtualTime
from contracts.clock import now
from contracts.config import DeadlinesConfig, ModelConfig
from contracts.records import Rollout, WeightsUpdate
from contracts.workers import RolloutConfig

INSTANT = Cluster(
    slots=256,
    response_s=0.0,
    learn_s=0.0,
    publish_s=0.0,
    weights_bytes=0.0,
    latency_s=0.0,
    apply_s=0.0,
    score_s=0.0,
)

_FOLLOWED_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    sweep = commands.add_parser("throughput", help="simulated throughput against the ideal")
    sweep.add_argument("--actors", type=int, nargs="+", default=[1, 4, 16, 64, 256, 512, 640, 1024, 4096])
    sweep.add_argument("--slots", type=int, default=8)
    sweep.add_argument("--batch-size", type=int, default=2048)
    sweep.add_argument("--group-size", type=int, default=8)
    sweep.add_argument("--max-lag-steps", type=int, default=2)
    sweep.add_argument("--steps", type=int, default=14)
    sweep.set_defaults(run=throughput)
    speed = commands.add_parser("control-plane", help="trajectories a second of the driver")
    speed.add_argument("--steps", type=int, default=20)
    speed.add_argument("--batch-size", type=int, default=512)
    speed.add_argument("--group-size", type=int, default=8)
    speed.add_argument("--prompt-tokens", type=int, default=64)
    speed.add_argument("--response-tokens", type=int, default=128)
    speed.add_argument("--ray-actors", type=int, nargs="*", default=[1, 2])
    speed.add_argument("--profile", type=int, default=0, metavar="N", help="print the N functions that cost the most")
    speed.set_defaults(run=control_plane)
    long = commands.add_parser("memory", help="resident memory over a long simulated run")
    long.add_argument("--steps", type=int, default=2000)
    long.add_argument("--marks", type=int, default=8)
    long.set_defaults(run=memory)
    rising = commands.add_parser("autoscale", help="workers that follow the work, in virtual time")
    rising.add_argument("--max-workers", type=int, default=4)
    rising.add_argument("--steps", type=int, default=60, help="in each of three phases: slow, fast, slow learner")
    rising.add_argument("--slow-s", type=float, default=44.0, help="a step of the learner in the first and last phase")
    rising.add_argument("--fast-s", type=float, default=11.0, help="a step in the second")
    rising.add_argument("--cold-start-s", type=float, default=60.0, help="until a new worker serves")
    rising.add_argument("--straggler-fraction", type=float, default=0.0)
    rising.set_defaults(run=autoscale)
    arguments = parser.parse_args()
    arguments.run(arguments)


def throughput(arguments: argparse.Namespace) -> None:
    """One learner, ever more actors: what limits changes from generation to learning or staleness."""
    print("| actors | samples/s | ideal | share | limit | slots occupied | learner busy | real s | peak MiB |")
    print("| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for actors in arguments.actors:
        cluster = Cluster(actors=actors, slots=arguments.slots, response_s=20.0, learn_s=8.0, publish_s=0.5)
        work = Workload(
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            group_size=arguments.group_size,
            max_lag_steps=arguments.max_lag_steps,
        )
        begun = time.perf_counter()
        result, best = simulate(cluster, work), ideal(cluster, work)
        print(
            f"| {actors} | {result.samples_per_s:.2f} | {best.samples_per_s:.2f} "
            f"| {result.samples_per_s / best.samples_per_s:.1%} | {best.limit} "
            f"| {result.occupied_slots_fraction:.1%} | {result.learner_busy_fraction:.1%} "
            f"| {time.perf_counter() - begun:.0f} | {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} |",
            flush=True,
        )


class InstantPool(SimulatedPool):
    """Engines in this process that answer in the next turn of the event loop."""

    def __init__(self, *args: Any, answered: Callable[[RolloutRequest, int], Rollout], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answered = answered

    async def generate(self, worker: SimulatedWorker, request: RolloutRequest, *, deadline_s: float) -> Rollout:
        try:
            with worker.busy, self.busy:
                await asyncio.sleep(0)
                return self._answered(request, worker.version)
        finally:
            self._roster.release(worker)


@ray.remote
class InstantActor:
    """A rollout actor on the real line to the pool whose engine takes no time."""

    def __init__(self, actor_id: str, model: ModelConfig, config: RolloutConfig, *, version: int, **more: Any) -> None:
        self._version = version
        self._mailbox = Mailbox(self.generate)
        self._response_tokens = int(os.environ["RESPONSE_TOKENS"])

    async def start(self, *, seed: int) -> Started:
        return Started(self._version, "127.0.0.1", "")

    async def submit(self, requests: list[tuple[int, RolloutRequest]]) -> None:
        self._mailbox.submit(requests)

    async def cancel(self, numbers: list[int]) -> None:
        self._mailbox.cancel(numbers)

    async def finished(self, *, received: int, wait_s: float) -> Finished:
        return Finished(*await self._mailbox.unreceived(received=received, wait_s=wait_s))

    async def generate(self, request: RolloutRequest) -> Rollout:
        return response(request, self._version, self._response_tokens)

    async def load_weights(self, update: WeightsUpdate, payload: object, *, deadline_s: float) -> WeightsAnswer:
        self._version = update.version
        return WeightsAnswer(update.version, 0.0)

    async def stop(self) -> None:
        pass


def response(request: RolloutRequest, version: int, num_tokens: int) -> Rollout:
    return Rollout(
        trajectory_id=request.trajectory_id,
        prompt_id=request.prompt_id,
        group_id=request.group_id,
        prompt_tokens=request.prompt_tokens,
        response_tokens=list(range(num_tokens)),
        response_text="x" * 4 * num_tokens,
        behavior_logprobs=[-1.0] * num_tokens,
        weights_versions=[version] * num_tokens,
        finish_reason="stop",
        actor_id="instant",
    )


def control_plane(arguments: argparse.Namespace) -> None:
    """The real coroutines and files of a run in real time; only models are missing."""
    num_tokens = arguments.response_tokens
    print("| engines | trajectories/s |")
    print("| --- | ---: |")

    def in_process(cluster: Cluster, tasks: asyncio.TaskGroup, folder: Path) -> SimulatedPool:
        answered = partial(response, num_tokens=num_tokens)
        return InstantPool(cluster, tasks, seed=0, version=0, answered=answered)

    profile = cProfile.Profile() if arguments.profile else None
    rate = asyncio.run(drive(arguments, in_process, 1, profile))
    print(f"| in this process | {rate:.0f} |", flush=True)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(arguments.profile)
    if arguments.ray_actors:
        options: Any = {"env_vars": {"RESPONSE_TOKENS": str(num_tokens)}}
        ray.init(
            address="local",
            num_cpus=max(arguments.ray_actors),
            include_dashboard=False,
            log_to_driver=False,
            runtime_env=options,
        )
        try:
            for number in arguments.ray_actors:
                profile = cProfile.Profile() if arguments.profile else None
                rate = asyncio.run(drive(arguments, ray_pool, number, profile))
                print(f"| {number} Ray actor(s) | {rate:.0f} |", flush=True)
                if profile is not None:
                    pstats.Stats(profile).sort_stats("tottime").print_stats(arguments.profile)
        finally:
            ray.shutdown()


def ray_pool(cluster: Cluster, tasks: asyncio.TaskGroup, folder: Path) -> RolloutPool:
    """The real pool, of actors that answer at once."""
    AutoConfig.for_model("llama", vocab_size=1 << 10).save_pretrained(folder / "model")
    return RolloutPool(
        ModelConfig(path=str(folder / "model")),
        RolloutConfig(num_workers=cluster.actors, max_concurrent=cluster.slots),
        DeadlinesConfig(),
        path=str(folder / "model"),
        version=0,
        seed=0,
        actor_class=InstantActor,
    )


async def drive(
    arguments: argparse.Namespace,
    pool: Callable[[Cluster, asyncio.TaskGroup, Path], Any],
    num_workers: int,
    profile: cProfile.Profile | None,
) -> float:
    """Trajectories a second, from the first request to the last step's row."""
    work = Workload(
        steps=arguments.steps, batch_size=arguments.batch_size, group_size=arguments.group_size, max_lag_steps=2
    )
    cluster = replace(INSTANT, actors=num_workers)
    with tempfile.TemporaryDirectory() as folder:
        async with asyncio.TaskGroup() as tasks:
            simulation = Simulation(cluster, work, tasks, Path(folder), prompt_tokens=arguments.prompt_tokens)
            job: Any = simulation.job
            job.pool = simulation.pool = pool(cluster, tasks, Path(folder))
            job.log = RunLog(Path(folder), resume_step=None)
            await start_workers(job)
            begun = time.perf_counter()
            if profile is not None:
                profile.enable()
            await run_steps(job, arguments.steps)
            if profile is not None:
                profile.disable()
            seconds = time.perf_counter() - begun
            job.log.close()
            stopping = job.pool.stop()
            if stopping is not None:
                await stopping
    return float(arguments.steps * arguments.batch_size / seconds)


async def start_workers(job: Any) -> None:
    """Of either pool; what notifies the job of a change is a coroutine in the simulated one only."""
    if isinstance(job.pool, SimulatedPool):
        job.pool.on_change = lambda event: job.notify()
        job.pool.start()
        return
    job.pool.on_update = lambda: asyncio.ensure_future(job.notify())
    await job.pool.start()


async def run_steps(job: Any, steps: int) -> None:
    """As `cluster.train.run`, with nothing before the first step and nothing after the last."""
    async with asyncio.TaskGroup() as tasks:
        collecting = tasks.create_task(train.collect(job))
        clock = StepClock(job)
        while job.version < steps:
            await train.learn(job, clock)
        collecting.cancel()


def memory(arguments: argparse.Namespace) -> None:
    """Deaths, stragglers and expired leases included: whatever is kept for each of them would show."""
    cluster = Cluster(actors=16, slots=16, straggler_fraction=0.02, death_every_s=5000.0, learn_s=5.0)
    work = Workload(steps=arguments.steps, batch_size=128, max_lag_steps=2, lease_s=150.0, bad_fraction=0.01)
    every = max(1, arguments.steps // arguments.marks)
    print("| step | resident MiB | queue ids remembered | expired so far |")
    print("| ---: | ---: | ---: | ---: |")

    async def to_the_end() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with asyncio.TaskGroup() as tasks:
                simulation = Simulation(cluster, work, tasks, Path(folder))
                job, measure = simulation.job, simulation.log.after_step

                def mark(row: Any) -> None:
                    measure(row)
                    if row["step"] % every == 0:
                        gc.collect()
                        remembered = len(job.queue._accepted)
                        print(f"| {row['step']} | {resident_mib():.1f} | {remembered} | {job.leases.counts.expired} |")

                simulation.log.after_step = mark
                await simulation.run()

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(to_the_end())


class UnevenLearner(SimulatedLearner):
    """Its steps take `slow_s`, then `fast_s`, then `slow_s` again, each for `steps` steps."""

    def __init__(self, cluster: Cluster, *, steps: int, slow_s: float, fast_s: float) -> None:
        super().__init__(cluster)
        self._steps, self._slow_s, self._fast_s = steps, slow_s, fast_s

    async def step(self, samples: object, *, training_version: int) -> dict[str, float]:
        fast = self._steps <= training_version < 2 * self._steps
        await asyncio.sleep(self._fast_s if fast else self._slow_s)
        return {}


@dataclass
class Followed:
    """A run whose work rises and falls. `workers` are pairs of a time and the number that then ran."""

    seconds: float
    worker_s: float
    busy: list[float]  # the learner's share, by phase
    workers: list[tuple[float, int]]
    rise_s: float  # from the begin of the second phase until the most workers ran
    resizes: int


def autoscale(arguments: argparse.Namespace) -> None:
    """The real decision and its application; a worker-second counts from a worker's start to its end."""
    base = Cluster(slots=16, learn_s=0.0, restart_s=arguments.cold_start_s, max_actors=arguments.max_workers)
    base = replace(base, straggler_fraction=arguments.straggler_fraction, straggler_factor=4.0)
    print("| workers | samples/s | worker-hours | learner busy: slow, fast, slow | changes | all running after |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for constant in (*range(1, arguments.max_workers + 1), None):
        found = follow(arguments, replace(base, actors=constant or 1, autoscale=constant is None))
        samples = 3 * arguments.steps * _FOLLOWED_BATCH / found.seconds
        busy = ", ".join(f"{share:.1%}" for share in found.busy)
        name = f"constant {constant}" if constant else f"1 to {arguments.max_workers}, following"
        rise = "" if constant else f"{found.rise_s:.0f} s"
        print(
            f"| {name} | {samples:.3f} | {found.worker_s / 3600:.2f} | {busy} | {found.resizes} | {rise} |", flush=True
        )
    told = ", ".join(f"{count} at {at:.0f} s" for at, count in found.workers)
    print(f"\nWorkers running: {told}; end at {found.seconds:.0f} s")


def follow(arguments: argparse.Namespace, cluster: Cluster) -> Followed:
    """One run, in virtual time."""
    steps = arguments.steps
    work = Workload(steps=3 * steps, batch_size=_FOLLOWED_BATCH, group_size=4, max_lag_steps=2)
    found = Followed(0.0, 0.0, [], [], 0.0, 0)
    sums: Counter[tuple[int, str]] = Counter()

    async def to_the_end(folder: Path) -> None:
        async with asyncio.TaskGroup() as tasks:
            simulation = Simulation(cluster, work, tasks, folder)
            job: Any = simulation.job
            job.learner = UnevenLearner(cluster, steps=steps, slow_s=arguments.slow_s, fast_s=arguments.fast_s)
            fast_since = 0.0

            def mark(row: Any) -> None:
                nonlocal fast_since
                phase, running = (row["step"] - 1) // steps, job.pool.counts().running
                fast_since = now() if row["step"] == steps else fast_since
                for name in ("step_s", "learn_s"):
                    sums[phase, name] += row[name]
                if not found.workers or found.workers[-1][1] != running:
                    found.workers.append((now(), running))
                    if phase == 1:
                        found.rise_s = now() - fast_since

            simulation.log.after_step = mark
            resize = job.pool.resize

            def resized(num_workers: int, *, cause: str) -> None:
                found.resizes += 1
                resize(num_workers, cause=cause)

            job.pool.resize = resized
            await simulation.run()
            found.seconds = now()
            found.worker_s = job.scaling.spent_worker_s if job.scaling else cluster.actors * now()

    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(to_the_end(Path(folder)))
    found.busy = [sums[phase, "learn_s"] / sums[phase, "step_s"] for phase in range(3)]
    return found


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
