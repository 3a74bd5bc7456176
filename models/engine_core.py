"""Whether an engine core answers, and whether its process still computes: a stopped or hung one is silent, not dead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import psutil

_EVERY_S = 1.0
# Share of one core below which a process counts as standing still. Threads that only wait take less than 0.001.
_COMPUTING = 0.02
# Longer gaps between two looks are the looker's own: it was stopped, or its loop was busy, and could hear nothing.
_LONGEST_GAP_S = 10.0


class CoreWatch:
    """Asks the core one question at a time, which it answers between two of its steps.

    `unanswered_s` is for how long it has owed an answer, 0 while it answers; `idle_s` for how long of that its process
    has stood still. A long step leaves a question unanswered and computes; a stopped process does neither.
    """

    def __init__(self, ask: Callable[[], Awaitable[object]], computed_s: Callable[[], float]) -> None:
        self._ask = ask
        self._computed_s = computed_s
        self._asked: asyncio.Future[object] | None = None
        self._looked_at = time.monotonic()
        self._computed: float | None = None  # None: not looked at since the question
        self.unanswered_s = 0.0
        self.idle_s = 0.0

    def look(self) -> None:
        """Bring the two up to date; never waits. Only as often as every second does it do anything."""
        gap_s = time.monotonic() - self._looked_at
        if self._asked is not None and gap_s < _EVERY_S:
            return
        self._looked_at += gap_s
        if self._asked is None or self._asked.done():
            if self._asked is not None and not self._asked.cancelled():
                self._asked.exception()  # a core that died: the engine knows, and says so to whoever uses it
            self._asked = asyncio.ensure_future(self._ask())
            self._computed, self.unanswered_s, self.idle_s = None, 0.0, 0.0
            return
        self.unanswered_s += min(gap_s, _LONGEST_GAP_S)
        before, self._computed = self._computed, self._computed_s()
        still = before is not None and self._computed - before < _COMPUTING * gap_s
        self.idle_s = self.idle_s + min(gap_s, _LONGEST_GAP_S) if still else 0.0


def computed_s(pids: list[int]) -> float:
    """CPU seconds that the processes and all their children have used. Reads the machine's process table."""
    total = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            for process in (core := psutil.Process(pid), *core.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += times.user + times.system
    return total
