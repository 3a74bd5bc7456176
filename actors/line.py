"""The pool's end of the line to one rollout actor: requests out, answers in, and the proof that both ends are alive.

Requests of the same turn of the loop travel in one call. Answers come back through a long poll, which the actor ends
as soon as it has one, and which is repeated for as long as the actor lives: it is the sign of life, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from ray.exceptions import ActorUnavailableError, ObjectLostError

from actors.admission import BadRollout
from actors.mailbox import Answer, Finished, RolloutRequest
from contracts.clock import now
from contracts.config import DeadlinesConfig
from contracts.records import Rollout
from contracts.waiting import NoAnswer, answer

_POLL_S = 5.0
_AGAIN_S = 0.2
# Ray calls an actor unreachable when a connection broke for a moment, and when its node has died but is not known to.
_UNREACHABLE_S = 5.0


class Silent(RuntimeError):
    """An actor, or its engine core, is there and does not answer: stopped, or hung."""


class EngineBroken(RuntimeError):
    """An actor whose engine serves nothing any more; carries the reason and the last of what it wrote to stderr."""


class Line:
    """Requests to one actor and what becomes of them.

    It waits for the actor in two tasks, of which `open` starts the one that receives. An actor that dies, is silent for
    `deadlines.silent_s` or has a broken engine is reported once, to `on_lost`, whose part it is to `close` the line.
    """

    def __init__(
        self,
        actor_id: str,
        handle: Any,
        deadlines: DeadlinesConfig,
        *,
        node: str,
        on_lost: Callable[[Exception], None],
    ) -> None:
        self._who = f"rollout actor {actor_id}"
        self._actor_id = actor_id
        self._handle = handle
        self._deadlines = deadlines
        self._wait_s = min(_POLL_S, deadlines.silent_s / 4)
        self._node = node
        self._on_lost = on_lost
        self._next_number = 0
        self._waiting: dict[int, asyncio.Future[Rollout]] = {}
        self._unsent: dict[int, RolloutRequest] = {}
        self._withdrawn: list[int] = []
        self._received = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._sender: asyncio.Task[None] | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._closed: Exception | None = None

    def open(self) -> None:
        """Start to receive."""
        self._receiver = self._begin(self._receive())

    def close(self, error: Exception) -> None:
        """`error` to everybody who waits, or comes later."""
        self._closed = error
        for task in (self._sender, self._receiver):
            if task is not None:
                task.cancel()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._waiting.clear()
        self._empty.set()

    @property
    def closed(self) -> bool:
        return self._closed is not None

    @property
    def num_waiting(self) -> int:
        """Requests without an answer."""
        return len(self._waiting)

    async def emptied(self) -> None:
        """Wait until every request is answered, withdrawn, or lost with the line."""
        await self._empty.wait()

    async def fetch(self, request: RolloutRequest) -> Rollout:
        """The response to a request; waits for as long as the actor lives. Cancelling it cancels the request there.

        Raises:
            BadRollout: the engine cannot take this request.
            RuntimeError: the actor failed at it; carries its traceback.
            What `close` was given: the actor is lost.
        """
        if self._closed is not None:
            raise self._closed
        number, self._next_number = self._next_number, self._next_number + 1
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._empty.clear()
        self._unsent[number] = request
        self._wake_sender()
        try:
            return await waiting
        except asyncio.CancelledError:
            self._withdraw(number)
            raise

    def _withdraw(self, number: int) -> None:
        if self._waiting.pop(number, None) is None:
            return
        if self._unsent.pop(number, None) is None and self._closed is None:
            self._withdrawn.append(number)
            self._wake_sender()
        self._set_empty()

    def _set_empty(self) -> None:
        if not self._waiting:
            self._empty.set()

    def _wake_sender(self) -> None:
        if self._sender is None or self._sender.done():
            self._sender = self._begin(self._send())

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Whatever it ended with, nothing would come through any more."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception) and self._closed is None:
            self._on_lost(error)

    async def _send(self) -> None:
        """What is asked for while one call is on its way travels in the next."""
        while self._unsent or self._withdrawn:
            requests, self._unsent = list(self._unsent.items()), {}
            withdrawn, self._withdrawn = self._withdrawn, []
            if requests:
                await self._tell("take requests", self._handle.submit, requests)
            if withdrawn:
                await self._tell("cancel requests", self._handle.cancel, withdrawn)

    async def _tell(self, asked: str, method: Any, argument: object) -> None:
        """Repeated where it may not have arrived: the actor knows what it has been told already."""
        while True:
            with suppress(ActorUnavailableError):  # for how long is for `_receive` to decide
                await self._answer(method.remote(argument), asked, self._deadlines.silent_s)
                return
            await asyncio.sleep(_AGAIN_S)

    async def _receive(self) -> None:
        unreachable_since: float | None = None
        while True:
            try:
                call = self._handle.finished.remote(received=self._received, wait_s=self._wait_s)
                finished = await self._answer(call, "hand over responses", self._wait_s + self._deadlines.silent_s)
            except (ActorUnavailableError, ObjectLostError):  # the actor still has what it sent
                unreachable_since = now() if unreachable_since is None else unreachable_since
                if now() - unreachable_since > _UNREACHABLE_S:
                    raise
                await asyncio.sleep(_AGAIN_S)
                continue
            unreachable_since = None
            self._raise_if_not_well(finished)
            self._received = finished.first + len(finished.answers)
            for each in finished.answers:
                self._deliver(each)
            self._set_empty()

    async def _answer(self, call: Any, asked: str, deadline_s: float) -> Any:
        try:
            return await answer(call, who=self._who, asked=asked, deadline_s=deadline_s, node=self._node)
        except NoAnswer as error:
            raise Silent(f"silent: {error}") from error

    def _raise_if_not_well(self, finished: Finished) -> None:
        """A core that computes has until the end of a lease: no step of it takes as long as a response may."""
        if finished.broken:
            raise EngineBroken(finished.broken)
        silent_s, lease_s = self._deadlines.silent_s, self._deadlines.lease_s
        if finished.idle_s > silent_s or finished.unanswered_s > lease_s:
            doing = f"its process has stood still for {finished.idle_s:.1f} s"
            if finished.unanswered_s > lease_s:
                doing = "its process computes, but no step takes that long (deadlines.lease_s)"
            since = f"has not answered for {finished.unanswered_s:.1f} s"
            raise Silent(f"silent: the engine core of {self._who} on node {self._node} {since}; {doing}")

    def _deliver(self, each: Answer) -> None:
        waiting = self._waiting.pop(each.number, None)
        if waiting is None or waiting.done():
            return  # withdrawn meanwhile, or delivered before
        if each.rollout is not None:
            waiting.set_result(each.rollout)
        elif each.refused:
            waiting.set_exception(BadRollout(f"{self._actor_id}: {each.refused}"))
        else:
            waiting.set_exception(RuntimeError(f"{self._who} failed at a request: {each.failed}"))
