"""Asking replicas: again where one drains or dies before its first byte, never after its deadline."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from contracts.clock import now
from contracts.events import Event, first_line
from contracts.waiting import NoAnswer, answer
from serving.meters import Meters
from serving.protocol import BUSY_S, ApiError
from serving.records import Head, PolicyRequest
from serving.wire import Inbox

_NO_PROXY = "no_grpc_proxy"  # gRPC reads it in this spelling, and instead of no_proxy
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5
_LOST = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)

log = logging.getLogger("ray.serve")  # what goes there is in Serve's log of the replica


def tell(event: Event) -> None:
    """What went wrong, why, and what follows from it."""
    log.warning("%s: %s: %s; %s", event.event, event.who, event.cause, event.consequence)


class _Raised(Exception):
    """What a replica raised, by either way of calling it: one line, without the names of Ray's processes."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {first_line(error)}")


FAILED = (RayError, RayServeException, _Raised)


class Ended(Exception):
    """A replica's answer ended before it began, or before its end."""


class _Call:
    """One call of a replica: what it says comes by wire, or through Serve where no wire reaches it."""

    def __init__(self, handle: Any, request: PolicyRequest, inbox: Inbox) -> None:
        self._inbox, self._box = inbox, inbox.box()
        self._response = handle.remote(replace(request, reply_to=self._box.reply_to))
        self._listening = asyncio.ensure_future(self._listen())

    async def head(self) -> Head:
        first = await self._box.take_first()
        if not first:
            raise Ended("the replica's answer ended before it began")
        return Head.read(first)

    async def part(self) -> bytes:
        """b"" at the end."""
        return await self._box.take()

    def close(self) -> None:
        """It ends in the engine too, where it still runs."""
        self._inbox.close(self._box)
        if not self._box.ended:
            # In a turn of its own: by then `_listen` knows the replica, if one took the call in this turn. Serve can
            # only cancel a call whose replica somebody has waited for.
            asyncio.get_running_loop().call_soon(self._cancel)

    def _cancel(self) -> None:
        self._response.cancel()
        self._listening.cancel()

    async def _listen(self) -> None:
        """Hear what Serve says of the call: all of the answer, or its end and every failure before that."""
        heard = False
        try:
            async for said in self._response:
                self._box.put(said.written() if isinstance(said, Head) else said)
                heard = True
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            self._box.fail(Ended("the replica gave the call up"))
        except RayTaskError as error:
            self._box.fail(_Raised(error.cause))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the answer is waited for
            self._box.fail(error if isinstance(error, FAILED) else _Raised(error))
        else:
            if heard or self._box.reply_to is None:
                self._box.put(b"")  # else the end comes by wire, like all before it


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


def pass_http_proxies_by() -> None:
    """Calls by value go by gRPC, which would ask a proxy of the environment for replicas of this machine too."""
    others = os.environ.get(_NO_PROXY, os.environ.get("no_proxy", ""))
    os.environ[_NO_PROXY] = f"{others},{ray.util.get_node_ip_address()}"


class Replicas:
    """The replicas of one slot, on the event loop that asks them.

    A call goes to the replica itself (`_by_value`), which costs both sides some 2 ms less than a call of Ray's, while
    `on_one_machine` says that no replica is elsewhere: there a connection is closed when a process dies. Of a machine
    that has fallen silent only Ray tells in time.
    """

    def __init__(
        self,
        slot: str,
        handle: DeploymentHandle,
        *,
        retries: int,
        meters: Meters,
        inbox: Inbox,
        on_one_machine: Callable[[], bool],
    ) -> None:
        self.slot = slot
        handle._init(_run_router_in_separate_loop=False)  # else each call goes through another thread, there and back
        self._by_ray: Any = handle.options(stream=True, method_name="answer")
        self._by_value: Any = self._by_ray.options(_by_reference=False, request_serialization="pickle")
        self._retries, self._meters, self._inbox = retries, meters, inbox
        self._on_one_machine = on_one_machine

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
        call = _Call(self._by_value if self._on_one_machine() else self._by_ray, request, self._inbox)
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
