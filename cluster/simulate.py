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
import math
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from actors.prompts import PromptStream
from cluster import train
from cluster.job import Job
from cluster.leases import LeaseBook
from cluster.metrics import StepClock
from cluster.scaling import Scaling
from cluster.simulated import (
    Cluster,
    Silent,
    SimulatedLearner,
    SimulatedLog,
    SimulatedPool,
    SimulatedScorers,
    Workload,
    response_seconds,
)
from cluster.virtual_time import VirtualTime
from contracts.clock import now
from contracts.config import Config, ConfigError
from contracts.loading import validate
from contracts.records import Prompt
from contracts.stopping import StopRequest
from learner.experience_queue import ExperienceQueue, StalenessBound

_NUM_PROMPTS = 64


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
        config = configuration(work, folder, cluster)
        bound = StalenessBound(work.max_lag_steps, work.batch_size // work.group_size, work.stale_tokens)
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
        if config.rollout.autoscale is not None:
            self.job.scaling = Scaling(self.job, config.rollout.autoscale)

    async def run(self) -> None:
        """As `cluster.train.run`, with nothing before the first step and nothing after the last."""
        self.pool.start()
        background = [
            self.tasks.create_task(train.collect(self.job)),
            self.tasks.create_task(train.raise_pool_failure(self.job)),
        ]
        if self.job.scaling is not None:
            background.append(self.tasks.create_task(self.job.scaling.watch()))
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


def configuration(work: Workload, folder: Path, cluster: Cluster) -> Config:
    """The run's configuration, checked as that of a real one."""
    hours = cluster.max_actor_hours if cluster.max_actor_hours < math.inf else None
    autoscale = {
        "max_workers": cluster.max_actors,
        "interval_s": cluster.autoscale_interval_s,
        "max_worker_hours": hours,
    }
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
            "rollout": {
                "num_workers": cluster.actors,
                "max_concurrent": cluster.slots,
                "autoscale": autoscale if cluster.autoscale else None,
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
        configuration(work, Path(folder), cluster)  # a task group would wrap what it raises
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
    try:
        cluster = Cluster(**{each.name: given[each.name] for each in fields(Cluster)})
        work = Workload(**{each.name: given[each.name] for each in fields(Workload)})
        result = simulate(cluster, work)
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    print(report(cluster, work, result))


if __name__ == "__main__":
    main()
