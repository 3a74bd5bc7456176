"""Asking replicas: again where one drains or dies before its first byte, never after its deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from contracts.clock import now
from contracts.events import Event, first_line
from contracts.waiting import NoAnswer, answer
from serving.meters import Meters
from serving.protocol import BUSY_S, ApiError
from serving.records import Head, PolicyRequest
from serving.wire import Box, Inbox

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5
_LOST = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
FAILED = (RayError, RayServeException)

log = logging.getLogger("ray.serve")  # what goes there is in Serve's log of the replica


def tell(event: Event) -> None:
    """What went wrong, why, and what follows from it."""
    log.warning("%s: %s: %s; %s", event.event, event.who, event.cause, event.consequence)


class Ended(Exception):
    """A replica's answer ended before it began."""


class _Call:
    """One call of a replica: what it says comes as Ray's objects, or after its head by wire."""

    def __init__(self, handle: Any, request: PolicyRequest, inbox: Inbox, *, streamed: bool) -> None:
        self._inbox, self._box = inbox, inbox.box() if streamed else None
        reply_to = None if self._box is None else self._box.reply_to
        self._response = handle.remote(replace(request, reply_to=reply_to))
        self._last: asyncio.Task[None] | None = None
        self._ended = False

    async def head(self) -> Head:
        head: Head = await self._said()
        if head.by_wire and self._box is not None:
            # Ray's part of the call is its end now, and every failure before that.
            self._last = asyncio.ensure_future(self._until_last(self._box))
        return head

    async def part(self) -> bytes:
        """b"" at the end."""
        part: bytes
        if self._last is not None and self._box is not None:
            if not (part := await self._box.take()):
                await self._last
        else:
            try:
                part = await self._said()
            except Ended:
                part = b""
        self._ended = not part
        return part

    def close(self) -> None:
        """It ends in the engine too, where it still runs."""
        if self._box is not None:
            self._inbox.close(self._box)
        if self._last is not None:
            self._last.cancel()
        if not self._ended:
            self._response.cancel()

    async def _said(self) -> Any:
        try:
            return await anext(self._response)
        except StopAsyncIteration as error:
            raise Ended("the replica's answer ended before it began") from error

    async def _until_last(self, box: Box) -> None:
        try:
            await self._said()
        except Ended:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the answer is waited for
            box.fail(error)


@dataclass
class Begun:
    """An answer whose first bytes are here. `close` it: that ends it in the engine where it still runs."""

    head: Head
    first: bytes
    call: _Call
    expires: float

    async def parts(self) -> AsyncIterator[bytes]:
        """The first bytes and what follows them.

        Raises:
            NoAnswer: the replica was silent until the request's deadline.
            RayError, RayServeException: it was lost.
        """
        part = self.first
        while part:
            yield part
            left_s = max(0.001, self.expires - now())
            part = await answer(self.call.part(), who=self.head.replica, asked="go on", deadline_s=left_s)

    def close(self) -> None:
        self.call.close()


class Replicas:
    """The replicas of one slot."""

    def __init__(self, slot: str, handle: DeploymentHandle, *, retries: int, meters: Meters, inbox: Inbox) -> None:
        self.slot = slot
        self._handle: Any = handle.options(stream=True, method_name="answer")
        self._retries, self._meters, self._inbox = retries, meters, inbox

    async def begin(self, request: PolicyRequest) -> Begun:
        """The answer of one of them from its first bytes on: within `request.deadline_s`, or not at all.

        Raises:
            ApiError: the replica refused it; none answered in time; or each that was asked died.
        """
        return await self._until_answered(request, whole=False)

    async def document(self, request: PolicyRequest) -> tuple[Head, bytes]:
        """The whole answer: nobody has seen a part of it, so it may be begun again up to its last byte."""
        begun = await self._until_answered(request, whole=True)
        return begun.head, begun.first

    async def _until_answered(self, request: PolicyRequest, *, whole: bool) -> Begun:
        expires = now() + request.deadline_s
        pause_s, failures = _FIRST_PAUSE_S, 0
        while True:
            left_s = expires - now()
            if left_s <= 0:
                raise self._too_late(request)
            try:
                begun = await self._once(replace(request, deadline_s=left_s), expires, whole=whole)
            except NoAnswer as error:
                tell(Event("expiry", self.slot, first_line(error), f"request {request.answer_id} is refused"))
                raise self._too_late(request) from error
            except (*FAILED, Ended) as error:
                failures += 1
                self._meters.asked_again("lost")
                consequence = "is refused" if failures > self._retries else "is sent again"
                tell(Event("death", self.slot, first_line(error), f"request {request.answer_id} {consequence}"))
                if failures > self._retries:
                    raise self._failed(error, failures) from error
            else:
                if begun is not None:
                    return begun
                self._meters.asked_again("draining")
            await asyncio.sleep(min(pause_s, max(0.0, expires - now())))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _once(self, request: PolicyRequest, expires: float, *, whole: bool) -> Begun | None:
        """None: the replica that was asked drains."""
        call = _Call(self._handle, request, self._inbox, streamed=not whole)
        begun = None
        asked: Any = {"who": f"a replica of {self.slot}", "asked": "answer a request", "deadline_s": request.deadline_s}
        try:
            head = await answer(call.head(), **asked)
            if head.draining:
                return None
            if head.status != 200:
                raise _refused(head)
            begun = Begun(head, await answer(call.part(), **asked), call, expires)
            if not begun.first:
                raise Ended("the replica's answer ended before it began")
            if whole:
                begun.first = b"".join([part async for part in begun.parts()])
            return begun
        except BaseException:
            begun = None
            raise
        finally:
            if begun is None:
                call.close()

    def _too_late(self, request: PolicyRequest) -> ApiError:
        message = f"no answer within {request.deadline_s:g} s: ask again, for fewer tokens or when less is going on"
        return ApiError(503, message, code="timeout", retry_after_s=BUSY_S)

    def _failed(self, error: BaseException, failures: int) -> ApiError:
        if isinstance(error, _LOST):
            message = f"{failures} replicas died over this request before their first token: ask again later"
            return ApiError(503, message, code="replica_lost", retry_after_s=BUSY_S)
        return ApiError(500, f"{failures} attempts failed, the last with: {first_line(error)}", code="replica_failed")


def _refused(head: Head) -> ApiError:
    said = head.error or {}
    message = str(said.get("message") or f"the replica {head.replica} refused the request")
    retry_after_s = BUSY_S if head.status == 503 else None
    kind = str(said.get("type") or "")
    return ApiError(
        head.status, message, param=said.get("param"), code=said.get("code"), retry_after_s=retry_after_s, kind=kind
    )
