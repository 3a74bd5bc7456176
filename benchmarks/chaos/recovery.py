"""When a run has recovered, read from its events and metrics alone. No processes in here.

A strike counts if the event log shows it: its `sign`. The run has recovered at the end of the first step that finished
after everything that the events say was lost is back, for good: all rollout workers, the learner, every replica, and
what the strike itself asks for (`until`, say a checkpoint after a full disk). The seconds of a recovery run from the
strike to the end of that step; for a full disk from the event that names it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Test = Callable[[Row], bool]

SETTLED_S = 3.0  # what one loss takes along is noticed at different times


@dataclass(frozen=True)
class Strike:
    """What was done to whom, and when (seconds since the epoch)."""

    kind: str
    victim: str
    struck: float
    sign: Test
    until: Test | None = None
    from_sign: bool = False  # the strike bit only when the sign was given


class Standing:
    """What a run lacks, event by event."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._restart()

    def _restart(self) -> None:
        self._workers: set[str] = set()
        self._learner = self._run = False
        self._replicas: Counter[str] = Counter()

    @property
    def whole(self) -> bool:
        return (
            self._run and self._learner and len(self._workers) >= self._num_workers and not any(self._replicas.values())
        )

    def apply(self, event: Row) -> None:
        kind, who = event["event"], str(event["who"])
        if who == "the run":
            if kind in ("start", "end"):
                self._restart()
                self._run = kind == "start"
        elif who.startswith("rollout-"):
            if kind in ("start", "restart"):
                self._workers.add(who)
            elif kind in ("death", "drain", "killed"):
                self._workers.discard(who)
        elif who.startswith(("learner rank", "the learner")):
            if kind in ("start", "restart"):
                self._learner = True
            elif kind in ("death", "lost"):
                self._learner = False
        elif who.startswith("node "):
            for name in re.findall(r"(rollout-\d+|learner rank) ?\S* (?:moves|is replaced)", str(event["consequence"])):
                self._workers.discard(name)
                self._learner = self._learner and name != "learner rank"
        elif kind in ("death", "restart"):
            self._replicas[who] = max(0, self._replicas[who] + (1 if kind == "death" else -1))


def seconds_to_recover(
    strike: Strike, events: Sequence[Row], rows: Sequence[Row], *, num_workers: int, now: float
) -> float | None:
    """None: not yet."""
    standing, sign, until = Standing(num_workers), None, strike.until is None
    back: float | None = None
    for event in events:
        standing.apply(event)
        if event["time"] >= strike.struck:
            if sign is None and strike.sign(event):
                sign = event["time"]
            if sign is not None and strike.until is not None and strike.until(event):
                until = True
        if sign is None or not until or not standing.whole:
            back = None
        elif back is None:
            back = event["time"]
    if back is None or sign is None or now - back < SETTLED_S:
        return None
    finished = [row["time"] for row in rows if row["time"] > back]
    if not finished:
        return None
    return float(min(finished) - (sign if strike.from_sign else strike.struck))


def has_shown(strike: Strike, events: Sequence[Row]) -> bool:
    """Whether the event log names it."""
    return any(event["time"] >= strike.struck and strike.sign(event) for event in events)
