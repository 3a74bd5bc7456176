"""Trackers show the rows of metrics.jsonl elsewhere. They may be slow or fail, and the run does not notice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Somewhere to look at a run. All calls come from one thread, in this order; each may wait and may raise."""

    name: str

    def open(self) -> str:
        """Returns where a person finds it; "" where there is nothing to say."""

    def write(self, row: Row) -> None:
        """Show a row of metrics.jsonl."""

    def close(self, *, failed: bool) -> None:
        """Finish what was written; `failed` says how the run ended."""


class Trackers:
    """Hands each row to every tracker.

    Consumes rows from the main loop and never holds it up: each tracker works in a thread of its own. `close` waits
    until everything is written, `deadline_s` at most. A tracker that raises, or that is in one call for longer than
    `deadline_s`, is given up: `on_lost` is told its name and why, once, with the next row or at the end.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        *,
        deadline_s: float,
        on_lost: Callable[[str, str], None],
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._deadline_s = deadline_s
        self._on_lost = on_lost
        self._at_work = [_AtWork(tracker, tell) for tracker in trackers]

    def write(self, row: Row) -> None:
        """Show a row of metrics.jsonl; returns at once."""
        self._give_up_on_those_that_failed(self._deadline_s)
        for each in self._at_work:
            each.write(row)

    async def close(self, *, failed: bool = False) -> None:
        """Let the trackers finish; what they have not done after `deadline_s` is left undone."""
        for each in self._at_work:
            each.close(failed=failed)
        await asyncio.gather(*(asyncio.to_thread(each.thread.join, self._deadline_s) for each in self._at_work))
        self._give_up_on_those_that_failed(0.0)

    def _give_up_on_those_that_failed(self, deadline_s: float) -> None:
        for each in tuple(self._at_work):
            if problem := each.problem(deadline_s):
                self._at_work.remove(each)
                self._on_lost(each.tracker.name, problem)


class _AtWork:
    """A tracker in its thread. The thread is a daemon: one that hangs must not keep the process."""

    def __init__(self, tracker: Tracker, tell: Callable[[str], None]) -> None:
        self.tracker = tracker
        self._tell = tell
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._since: float | None = None  # when the call that it is in began
        self._error: Exception | None = None
        self.thread = threading.Thread(target=self._work, name=f"tracker {tracker.name}", daemon=True)
        self._calls.put(self._open)
        self.thread.start()

    def write(self, row: Row) -> None:
        self._calls.put(lambda: self.tracker.write(row))

    def close(self, *, failed: bool) -> None:
        self._calls.put(lambda: self.tracker.close(failed=failed))
        self._calls.put(None)

    def problem(self, deadline_s: float) -> str:
        """What is wrong with it; "" for nothing."""
        if self._error is not None:
            return f"{type(self._error).__name__}: {' '.join(str(self._error).split())}"
        since = self._since
        waited_s = 0.0 if since is None else time.monotonic() - since
        return f"it has not answered for {waited_s:.0f} s" if waited_s > deadline_s else ""

    def _open(self) -> None:
        where = self.tracker.open()
        if where:
            self._tell(f"{self.tracker.name}: {where}")

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                self._since = time.monotonic()
                call()
                self._since = None
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the run goes on without it
            self._error = error
            self._since = None


def curves(row: Row) -> dict[str, float]:
    """The numbers of a row; not its step, which is the axis, nor the time of day."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("step", "time")
    }
