"""As many rollout workers as the work needs: measures a running run, asks cluster/autoscale.py, resizes the pool.

Ray's autoscaler follows by itself: it adds nodes for actors that are pending, and removes those that stand empty.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.autoscale import Limits, Load, Steady, reason, target_workers
from contracts.clock import now
from contracts.workers import AutoscaleConfig

if TYPE_CHECKING:
    from cluster.job import Job

_LOOK_AGAIN_S = 1.0
# A start that waited for hours for a node is no reason to keep workers for hours that nobody needs.
_MOST_KEPT_S = 600.0
_PATIENCE_INTERVALS = 5


class Scaling:
    """Decides after steps: measured is the time since the last decision, whole steps and at least `interval_s`.

    Workers are added as soon as the learner has waited that long. They are let go after max_lag_steps + 1 steps, in
    which batches come in bursts. The step in which the first batch forms, or a worker came or went, tells nothing of
    what there is now, and is left out; where that happens all the time, it is not.
    """

    def __init__(self, job: Job, config: AutoscaleConfig) -> None:
        self._job = job
        self._config = config
        self._limits = Limits(config.min_workers, config.max_workers)
        self._steady = Steady(begun_s=now())
        self._spent_s = 0.0
        self._spent_until = now()
        self._decided_at = now()
        self._running = -1  # workers in the last step: none was yet
        self._begin()

    @property
    def spent_worker_s(self) -> float:
        """Worker-seconds since the run began, from each one's process to its end."""
        self._spend()
        return self._spent_s

    def step(self, row: Mapping[str, Any]) -> None:
        """A step has finished; its row of metrics.jsonl."""
        self._spend()
        running = self._job.pool.counts().running
        changed, self._running = running != self._running, running
        if changed and now() - self._decided_at < _PATIENCE_INTERVALS * self._config.interval_s:
            self._begin()
            return
        self._steps += 1
        self._step_s += row["step_s"]
        self._wait_s += row["wait_s"]
        self._blocked_s += row["queue_blocked_s"] * self._job.config.training.samples_per_prompt
        if self._step_s >= self._config.interval_s:
            self._decide()

    def load(self) -> Load:
        """What was measured since the last decision."""
        job, pool = self._job, self._job.pool
        used, places, batch_size = pool.used(), job.config.rollout.max_concurrent, job.config.training.batch_size
        worker_s, place_s = used.worker_s - self._used.worker_s, used.place_s - self._used.place_s
        of_places_s = max(worker_s * places, 1e-9)
        hours, step_s = self._config.max_worker_hours, self._step_s / self._steps
        batches = min(job.bound.max_lag_steps + 1, job.config.steps - job.choosing)
        return Load(
            workers=pool.size,
            ready=worker_s / self._step_s,
            starting=pool.counts().starting,
            free_places_fraction=min(1.0, max(0.0, 1 - place_s / of_places_s)),
            learner_wait_fraction=self._wait_s / self._step_s,
            queue_blocked_fraction=min(1.0, self._blocked_s / of_places_s),
            samples_wanted=batches * batch_size,
            places_per_worker=places,
            cold_start_s=pool.cold_start_s,
            remaining_s=(job.config.steps - job.version) * step_s,
            worker_s_left=math.inf if hours is None else hours * 3600 - self._spent_s,
            interval_s=max(self._config.interval_s, self._step_s),
        )

    def _decide(self) -> None:
        load, pool = self.load(), self._job.pool
        keep_s = min(_MOST_KEPT_S, max(load.cold_start_s, self._config.interval_s))
        if self._steps <= self._job.bound.max_lag_steps and target_workers(load, self._limits) <= load.workers:
            return  # a burst may have let the learner work that long
        target = self._steady.decide(load, self._limits, at_s=now(), keep_s=keep_s)
        if target != load.workers:
            pool.resize(target, cause=reason(load, self._limits, target))
        self._decided_at = now()
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._step_s = self._wait_s = self._blocked_s = 0.0
        self._used = self._job.pool.used()

    def _spend(self) -> None:
        workers, at = self._job.pool.counts(), now()
        present = workers.running + workers.starting - workers.pending + workers.draining
        self._spent_s += present * (at - self._spent_until)
        self._spent_until = at

    async def watch(self) -> None:
        """Keep what is spent and shown up to date, for as long as the run lasts; waits for nothing but the time."""
        while True:
            self._spend()
            self._job.progress.workers(self._job.pool.counts())
            await asyncio.sleep(_LOOK_AGAIN_S)
