"""How many rollout workers a run needs: a pure decision from what the last steps measured."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What was measured since the last decision. Fractions are shares of wall time, 0 to 1.

    `free_places_fraction` counts places, not workers: requests go to the least loaded worker, so that each of many
    that are too many still has something to do. `workers` counts those that are starting too.
    `samples_wanted` is the most samples that the staleness bound lets be open, (max_lag_steps + 1) * batch_size.
    """

    workers: int
    free_places_fraction: float
    learner_wait_fraction: float
    queue_blocked_fraction: float
    samples_wanted: int
    places_per_worker: int


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
    always busy, as many full engines are needed as workers * (1 - free) / (1 - wait). More are asked for only while
    the places are full: engines that wait for the staleness bound or for the queue gain nothing from company. The
    answer never rises with free places or blocked time and never falls with the learner's waiting.
    """
    spare = min(1.0, max(load.free_places_fraction, load.queue_blocked_fraction, 0.0))
    wait = min(1.0, max(load.learner_wait_fraction, 0.0))
    change = min((1 - spare) / (1 - wait), limits.max_growth) if wait < 1 else limits.max_growth
    if spare > limits.hysteresis:
        change = min(change, 1.0)
    wanted = load.workers if abs(change - 1) <= limits.hysteresis else math.ceil(load.workers * change - 1e-9)
    useful = math.ceil(load.samples_wanted / load.places_per_worker)
    return max(limits.min_workers, min(wanted, useful, limits.max_workers))
