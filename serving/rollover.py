"""When a replica may take new weights: no answer is written by two versions, unless that is asked for.

The gate lets requests in. Before an exchange of weights it closes and waits until those inside have finished; meanwhile
others are turned away, to replicas that serve, or wait where there is no other replica. No Ray and no engine in here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

# For answers that were ended to come to their end; it takes one step of the engine.
_ENDING_S = 10.0


class DrainError(RuntimeError):
    """Answers that were ended did not come to their end: the weights stay as they are."""


class Gate:
    """Lets requests in; `num_running` of them are inside. On one event loop."""

    def __init__(self) -> None:
        self._ends: set[Callable[[], Awaitable[None]]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.turns_away = False  # draining, and others serve meanwhile

    @property
    def num_running(self) -> int:
        return len(self._ends)

    async def opened(self, *, wait_s: float) -> bool:
        """Whether a request may `enter`: at once, or after the exchange that it has to wait for; False if it is sent
        away, raises TimeoutError after `wait_s`.

        There must be no await between this and `enter`.
        """
        async with asyncio.timeout(wait_s):
            while not self._open.is_set():
                if self.turns_away:
                    return False
                await self._open.wait()
        return True

    @contextmanager
    def enter(self, end: Callable[[], Awaitable[None]]) -> Iterator[None]:
        """For the length of an answer; `end` makes it end soon."""
        assert self._open.is_set(), "opened() comes first"
        self._ends.add(end)
        self._empty.clear()
        try:
            yield
        finally:
            self._ends.discard(end)
            if not self._ends:
                self._empty.set()

    @asynccontextmanager
    async def drained(self, *, alone: bool, drain_s: float) -> AsyncIterator[int]:
        """Nobody is inside, and nobody comes in; gives how many answers had to be ended for it.

        Requests that come meanwhile wait where the replica is `alone`, else they are turned away. Answers that are
        still being written after `drain_s` are ended.

        Raises:
            DrainError: they did not end; those inside go on, and the gate is open again.
        """
        self._open.clear()
        self.turns_away = not alone
        try:
            yield await self._emptied(drain_s)
        finally:
            self.turns_away = False
            self._open.set()

    async def _emptied(self, drain_s: float) -> int:
        if await self._empty_within(drain_s):
            return 0
        ended = list(self._ends)
        for end in ended:
            await end()
        if not await self._empty_within(_ENDING_S):
            raise DrainError(f"{self.num_running} answers run on {_ENDING_S:g} s after they were ended")
        return len(ended)

    async def _empty_within(self, wait_s: float) -> bool:
        try:
            async with asyncio.timeout(wait_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
