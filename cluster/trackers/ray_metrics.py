"""The run as Ray metrics: on the Prometheus endpoint of the driver's node, as `ray_headrace_...`.

Each number of a row of metrics.jsonl is a gauge of the same name; what changes within a step is read every few
seconds; what adds up is a counter. All carry `run_id`, that of the run's Serve applications, and `run`, the name of
its folder. docs/metrics.md explains them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge

from cluster.trackers.tracker import Row, curves
from contracts.events import Event

if TYPE_CHECKING:
    from cluster.job import Job

PREFIX = "headrace_"
STATE_EVERY_S = 5.0

# Ray puts `ray_` before, and `_total` behind a counter.
GAUGES = {
    "queue_samples": "Scored responses that wait for the learner",
    "queue_bytes": "Their size",
    "open_groups": "Prompt groups that are being sampled or scored, or wait in the queue",
    "workers": "Rollout actors by state: wanted, ready, starting, of those pending (no node yet), draining",
    "reward_component": "Mean of one component of the reward over the last batch",
}
COUNTERS = {
    "events": "What happened beside the steps, by kind: death, restart, expiry, ... (events.jsonl)",
    "trained_samples": "Responses trained on",
    "sent_bytes": "Weights published, by kind: delta (or dense), keyframe",
}
_TAGS = {"workers": "state", "reward_component": "component", "events": "event", "sent_bytes": "kind"}


class RayMetrics:
    """Sets Ray's gauges and counters: nothing but memory of this process, Ray sends them every 10 s."""

    def __init__(self, *, run_id: str, run: str) -> None:
        self._of_run = {"run_id": run_id, "run": run}
        self._open = True
        self._gauges: dict[str, Gauge] = {}
        self._counters = {name: self._made(Counter, name, text) for name, text in COUNTERS.items()}
        for name, text in GAUGES.items():
            self._gauges[name] = self._made(Gauge, name, text)

    def row(self, row: Row) -> None:
        """A step has finished."""
        self._set("step", row["step"])
        for name, value in curves(row).items():
            if name.startswith("reward/"):
                self._set("reward_component", value, name.removeprefix("reward/"))
            else:
                self._set(name, value)
        self._add("trained_samples", row["samples"])
        self._add("sent_bytes", row["broadcast_bytes"], "delta")
        self._add("sent_bytes", row["broadcast_keyframe_bytes"], "keyframe")

    def event(self, event: Event) -> None:
        """Something has happened."""
        self._add("events", 1, event.event)

    def state(self, state: Mapping[str, float], workers: Mapping[str, int]) -> None:
        """Where the run stands within a step."""
        for name, value in state.items():
            self._set(name, value)
        for name, count in workers.items():
            self._set("workers", count, name)

    def close(self) -> None:
        """Ray goes: what comes later is not counted."""
        self._open = False

    def _set(self, name: str, value: float, tag: str = "") -> None:
        if name not in self._gauges:
            self._gauges[name] = self._made(Gauge, name, f"{name} of the last row of metrics.jsonl")
        if self._open:
            self._gauges[name].set(value, self._tags(name, tag))

    def _add(self, name: str, value: float, tag: str = "") -> None:
        if self._open and value > 0:
            self._counters[name].inc(value, self._tags(name, tag))

    def _tags(self, name: str, tag: str) -> dict[str, str]:
        return self._of_run | ({_TAGS[name]: tag} if name in _TAGS else {})

    def _made(self, kind: type, name: str, text: str) -> Any:
        tag_keys = (*self._of_run, *([_TAGS[name]] if name in _TAGS else []))
        return kind(PREFIX + re.sub(r"\W", "_", name), description=text, tag_keys=tag_keys)


async def watch(job: Job, metrics: RayMetrics) -> None:
    """Keep queue and workers up to date, for as long as the run lasts; waits for nothing but the time."""
    while True:
        workers = job.pool.counts()
        metrics.state(
            {
                "queue_samples": job.queue.num_samples,
                "queue_bytes": job.queue.num_bytes,
                "open_groups": job.leases.open_groups,
            },
            {
                "wanted": workers.wanted,
                "ready": workers.running,
                "starting": workers.starting,
                "pending": workers.pending,
                "draining": workers.draining,
            },
        )
        await asyncio.sleep(STATE_EVERY_S)
