"""The actor's end of the line to the pool: requests come in together, finished responses wait here to be fetched.

Nothing that was sent counts as delivered until the pool says so: a batch of answers that is lost on its way (the call
was interrupted, or the object that held it died) is handed over again by the next call.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from contracts.records import Rollout
from models.engine_update import WeightsError


@dataclass(frozen=True)
class RolloutRequest:
    """One response to sample. `seed` makes the draw repeatable for equal batch shapes."""

    trajectory_id: str
    prompt_id: str
    group_id: str
    prompt_tokens: list[int]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Started:
    """What an actor says when its engine is up: the weights version it serves, and where it runs.

    `node` is the address of the machine, `node_id` Ray's id of it (hex).
    """

    version: int
    node: str
    node_id: str


@dataclass(frozen=True)
class Answer:
    """What became of the request that the pool gave `number`: a response, or why there is none.

    `refused`: the engine cannot take this request. `failed`: a traceback; the actor is not to be relied on.
    """

    number: int
    rollout: Rollout | None = None
    refused: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Finished:
    """The answers that the pool does not have yet; `first` is how many came before them, since the actor started.

    `broken` says why the engine serves nothing any more. `unanswered_s` and `idle_s`: see models.engine_core.
    """

    first: int
    answers: list[Answer]
    broken: str = ""
    unanswered_s: float = 0.0
    idle_s: float = 0.0


class Mailbox:
    """Runs each request in a task of its own and keeps its answer until it has been received."""

    def __init__(self, generate: Callable[[RolloutRequest], Awaitable[Rollout]]) -> None:
        self.generate = generate
        self._running: dict[int, asyncio.Task[None]] = {}
        self._newest = -1
        self._answers: deque[Answer] = deque()
        self._received = 0
        self._news = asyncio.Event()

    def submit(self, requests: Sequence[tuple[int, RolloutRequest]]) -> None:
        """Start (number, request) pairs. Numbers go up: what is not newer than the newest was sent again."""
        for number, request in requests:
            if number > self._newest:
                self._newest = number
                self._running[number] = asyncio.ensure_future(self._run(number, request))

    def cancel(self, numbers: Iterable[int]) -> None:
        """Nobody waits for these any more; the engine stops working on them."""
        for number in numbers:
            if number in self._running:
                self._running[number].cancel()

    async def unreceived(self, *, received: int, wait_s: float) -> tuple[int, list[Answer]]:
        """(how many came before, the answers after the first `received`); empty after `wait_s` without any.

        What unblocks it: an answer. All that became ready in the same turn of the loop come along.
        """
        while self._received < received:
            self._answers.popleft()
            self._received += 1
        if not self._answers:
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
        return self._received, list(self._answers)

    async def _run(self, number: int, request: RolloutRequest) -> None:
        try:
            self._answers.append(Answer(number, rollout=await self.generate(request)))
        except WeightsError:
            return  # the engine is broken: `Finished.broken` says it, once for all requests
        except ValueError as error:
            self._answers.append(Answer(number, refused=str(error)))
        except Exception:  # noqa: BLE001 whatever it is, the pool is waiting to hear of it
            self._answers.append(Answer(number, failed=traceback.format_exc()))
        finally:
            del self._running[number]
            self._news.set()
