"""The row that a step adds to metrics.jsonl: where the time went, and what the rewards were."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from contracts.clock import now
from contracts.records import ScoredRollout

if TYPE_CHECKING:
    from cluster.job import Job


class StepClock:
    """Marks the parts of a step: waiting for a batch, learning, publishing. A step begins where the last one ended."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._begin()

    def _begin(self) -> None:
        self._begun = self._learning = self._done = now()
        self._idle = self._idle_seconds()
        self._generating = self._job.pool.busy.seconds()
        self._scoring = self._job.scoring.seconds()
        self._blocked = self._job.queue.blocked_s

    def waited(self) -> None:
        self._learning = now()

    def learned(self) -> None:
        self._done = now()

    def row(self, samples: Sequence[ScoredRollout]) -> dict[str, Any]:
        """The step's times in seconds, and the begin of the next; `generate_s` and `score_s` count overlaps once."""
        job, step_s = self._job, now() - self._begun
        learn_s = self._done - self._learning
        idle_s = (self._idle_seconds() - self._idle) / max(len(job.pool.workers), 1)
        row = {
            "step": job.version,
            "weights_version": job.version,
            "time": time.time(),
            "step_s": step_s,
            "samples_per_s": len(samples) / step_s,
            "wait_s": self._learning - self._begun,
            "learn_s": learn_s,
            "generate_s": job.pool.busy.seconds() - self._generating,
            "score_s": job.scoring.seconds() - self._scoring,
            "queue_blocked_s": job.queue.blocked_s - self._blocked,
            "learner_busy_fraction": learn_s / step_s,
            "rollout_idle_fraction": min(1.0, max(0.0, idle_s / step_s)),
            "samples": len(samples),
            "trajectories_issued": job.leases.counts.issued,
            "trajectories_trained": job.leases.counts.trained,
            "trajectories_quarantined": job.leases.counts.quarantined,
            "trajectories_expired": job.leases.counts.expired,
            "trajectories_dropped": job.leases.counts.dropped,
        }
        self._begin()
        return row

    def _idle_seconds(self) -> float:
        seen = now()
        return sum(seen - worker.since - worker.busy.seconds() for worker in self._job.pool.workers)


def reward_metrics(samples: Sequence[ScoredRollout]) -> dict[str, float]:
    """Mean of the reward and of each component over the samples of a batch that have it."""
    means = {"reward_mean": sum(sample.reward for sample in samples) / len(samples)}
    names = dict.fromkeys(name for sample in samples for name in sample.reward_components)
    for name in names:  # an ensemble's deviation may come or go with another reward model
        known = [sample.reward_components[name] for sample in samples if name in sample.reward_components]
        means[f"reward/{name}"] = sum(known) / len(known)
    return means
