"""How many rollout workers a run needs: pure decisions from what the last steps measured.

`target_workers` knows one measurement, `Steady` the ones before it: it lets workers go only when they have been too
many for as long as it would take to start them again. cluster/scaling.py measures and applies.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What was measured since the last decision. Fractions are shares of time, 0 to 1.

    `workers` is the number that there should be at the moment: those that are `starting` are in it. `ready` is how
    many worked while this was measured, on the average; default: all of them. `free_places_fraction` counts their
    places, not workers: requests go to the least loaded worker, so that each of many that are too many still has
    something to do. `queue_blocked_fraction` is as large a share of the places as finished responses waited for room
    in the queue. `samples_wanted` is the most samples that the staleness bound lets be open,
    (max_lag_steps + 1) * batch_size, or what the run has left to do.

    `cold_start_s` is how long a new worker takes until it serves, `remaining_s` how long the run goes on, and
    `worker_s_left` what it may still spend on workers, in worker-seconds, which are spent for `interval_s` at a time.
    """

    workers: int
    free_places_fraction: float
    learner_wait_fraction: float
    queue_blocked_fraction: float
    samples_wanted: int
    places_per_worker: int
    ready: float | None = None
    starting: int = 0
    cold_start_s: float = 0.0
    remaining_s: float = math.inf
    worker_s_left: float = math.inf
    interval_s: float = 1.0


@dataclass(frozen=True)
class Limits:
    """Bounds of the answer. `hysteresis` is the relative change below which nothing is done."""

    min_workers: int
    max_workers: int
    hysteresis: float = 0.15
    max_growth: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"min_workers {self.min_workers}: 1 to max_workers ({self.max_workers}) is allowed")


def target_workers(load: Load, limits: Limits) -> int:
    """The number of workers to have; `load.workers` where a change would not pay.

    A share 1 - free of the engines' places works and the learner works for 1 - wait of the time. To keep the learner
    always busy, as many full engines are needed as ready * (1 - free) / (1 - wait). More are asked for only while the
    places are full, as engines that wait for the staleness bound or for the queue gain nothing from company; at most
    `max_growth` times those that work, as what a learner that waits would consume is a guess; and only where the run
    outlasts their start. The answer never rises with free places or blocked time and never falls with the learner's
    waiting.
    """
    return max(limits.min_workers, min(_wanted(load, limits), most_workers(load, limits)))


def most_workers(load: Load, limits: Limits) -> int:
    """What the staleness bound lets work, the limit, and what there is money for; never below `min_workers`."""
    useful = math.ceil(load.samples_wanted / load.places_per_worker)
    return int(max(limits.min_workers, min(useful, limits.max_workers, _affordable(load))))


def reason(load: Load, limits: Limits, target: int) -> str:
    """Why the target is another than before, in words."""
    useful, most = math.ceil(load.samples_wanted / load.places_per_worker), most_workers(load, limits)
    if target > load.workers:
        if target == limits.min_workers:
            return f"min_workers is {target}"
        return f"the learner waits for {load.learner_wait_fraction:.0%} of the time, the engines are full"
    if target < most or most > load.workers:
        spare = max(load.free_places_fraction, load.queue_blocked_fraction)
        return f"{spare:.0%} of the engines' places are not needed, the learner waits {load.learner_wait_fraction:.0%}"
    if _affordable(load) <= target:
        return f"{max(0.0, load.worker_s_left) / 3600:.2f} of max_worker_hours are left"
    if useful <= target:
        return f"no more than {load.samples_wanted} responses may be open: {useful} workers hold them"
    return f"max_workers is {limits.max_workers}"


class Steady:
    """Grows at once, and shrinks to the largest target of the last `keep_s` seconds.

    Starting a worker again costs the learner as long a wait as keeping it costs of the worker's time: it stays for as
    long as a start takes, and a single quiet moment lets nobody go. While some are starting nobody goes either: what
    was measured is what those do who work already. What the limits, the bound or the money forbid goes at once.
    """

    def __init__(self, *, begun_s: float) -> None:
        self._targets: deque[tuple[float, float]] = deque([(begun_s, math.inf)])  # before that, nothing is known

    def decide(self, load: Load, limits: Limits, *, at_s: float, keep_s: float) -> int:
        """The number of workers to have, measured at `at_s` on any clock that goes forward."""
        target = target_workers(load, limits)
        while self._targets and self._targets[0][0] < at_s - keep_s:
            self._targets.popleft()
        self._targets.append((at_s, target))
        largest = math.inf if load.starting else max(each for _, each in self._targets)
        return int(max(target, min(largest, load.workers, most_workers(load, limits))))


def _wanted(load: Load, limits: Limits) -> int:
    """Before the bounds."""
    ready = float(load.workers if load.ready is None else load.ready)
    if ready <= 0:  # nothing was measured
        return load.workers
    spare = min(1.0, max(load.free_places_fraction, load.queue_blocked_fraction, 0.0))
    wait = min(1.0, max(load.learner_wait_fraction, 0.0))
    most = max(float(load.workers), ready * limits.max_growth)
    if spare > limits.hysteresis or load.remaining_s < load.cold_start_s:
        most = float(load.workers)
    need = min(ready * (1 - spare) / (1 - wait), most) if wait < 1 else most
    if abs(need - load.workers) <= limits.hysteresis * load.workers:
        return load.workers
    return math.ceil(need - 1e-9)


def _affordable(load: Load) -> float:
    """As many as can be paid for until there is another decision."""
    return load.worker_s_left // load.interval_s if load.worker_s_left < math.inf else math.inf
