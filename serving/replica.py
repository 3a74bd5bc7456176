"""A replica of the served policy: one vLLM engine that answers requests and takes the versions it is told to.

It consumes requests from the ingress and orders from the version keeper. A request waits for the first token, and while
weights are exchanged, at most its own deadline. The replica waits for orders as long as it lives, each time with a
deadline; without a keeper it serves on what it has. Ray Serve sends it requests once `__init__` has returned, which is
when it serves the current version, and replaces it when `check_health` raises.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from dataclasses import dataclass, replace

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from contracts.events import Event, first_line
from contracts.serving import ServingConfig
from contracts.waiting import NoAnswer, answer
from models.engine import Engine
from models.engine_core import CoreWatch
from models.engine_update import WeightsError
from models.openai import OpenAIHandlers, Refused
from models.weight_stream import DeltaError
from serving.records import LIVE, Head, Order, PolicyRequest, StartWeights
from serving.rollover import DrainError, Gate
from serving.taking import KEEPER, Taking
from serving.wire import Wires

_POLL_S = 10.0
_LATE_S = 20.0  # the keeper may be starting again, or hash what it reads from disk
_PAUSE_S = 1.0
_AT_WORK_S = 5.0
_ADAPTERS = 4  # versions that write at once; requests of one more wait for one of them to end
_EXCHANGE_S = 30.0  # of an order's deadline, which draining has to leave
SILENT_S = 60.0  # an engine core that stands still for so long is stopped or hung
_ASKING = (NoAnswer, RayError, RayServeException)  # the keeper is away

_log = logging.getLogger("headrace.serving")


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica is started with. `name` is the model's in the API; `key` signs what weights come in."""

    slot: str
    name: str
    start: StartWeights
    max_context_tokens: int
    config: ServingConfig
    start_s: float
    key: bytes | None = None


class _Running:
    """One request inside the gate, which may be told to end: for a drain, or by its deadline."""

    def __init__(self, handlers: OpenAIHandlers, request: PolicyRequest) -> None:
        self._handlers, self._request = handlers, request
        self._ending: asyncio.Task[None] | None = None
        self.drained = False

    async def make_room(self) -> None:
        """The weights are to be exchanged: what has no token yet is asked elsewhere, the rest ends here."""
        self.drained = True
        await self._abort()

    def expire(self) -> None:
        self._ending = asyncio.ensure_future(self._abort())

    async def _abort(self) -> None:
        await self._handlers.abort(self._request.kind, self._request.body, answer_id=self._request.answer_id)


class PolicyReplica:
    """The deployments `live` and `pinned-VERSION`; `versions` is that of the keeper."""

    async def __init__(self, settings: ReplicaSettings, versions: DeploymentHandle) -> None:  # type: ignore[misc]
        self._settings = settings
        self._versions = versions
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._pinned = None if settings.slot == LIVE else int(settings.slot.removeprefix("pinned-"))
        self._gate = Gate()
        self._wires = Wires(ray.get_runtime_context().get_node_id())
        self._engine = await start_engine(
            settings.config, settings.start, max_context_tokens=settings.max_context_tokens, start_s=settings.start_s
        )
        self._core = CoreWatch(self._engine.ping, self._engine.core_computed_s)
        self._taking = await Taking.into(self._engine, settings.key)
        most_tokens = settings.config.limits.max_response_tokens
        self._handlers = await asyncio.to_thread(OpenAIHandlers, self._engine, settings.name, most_tokens=most_tokens)
        await self._catch_up()
        self._following = asyncio.create_task(self._follow())

    async def answer(self, request: PolicyRequest) -> AsyncIterator[Head | bytes]:
        """A Head, together with the first token; then the answer, each JSON object with its id and weights version.

        Where the ingress is on this node and asked for it, all of that goes to its wire, and nothing is left to yield.
        Waits at most `request.deadline_s`; an answer that is not finished by then ends with what it has. Cancelling it
        frees the engine at once.
        """
        reply = self._wires.reached(request.reply_to)
        async with aclosing(self._said(request)) as said:
            if reply is not None:
                await self._wires.deliver(_written(said), reply)
                return
            async for part in said:
                yield part

    async def _said(self, request: PolicyRequest) -> AsyncGenerator[Head | bytes]:
        expires = asyncio.get_running_loop().time() + request.deadline_s
        try:
            let_in = await self._gate.opened(wait_s=request.deadline_s)
        except TimeoutError:
            yield self._late(request)
            return
        if not let_in:
            yield self._elsewhere()
            return
        if self._pinned not in (None, self._engine.version):
            yield self._not_here()
            return
        running = _Running(self._handlers, request)
        with self._gate.enter(running.make_room):
            async with aclosing(self._answered(request, running, expires)) as answered:
                async for part in answered:
                    yield part

    async def _answered(
        self, request: PolicyRequest, running: _Running, expires: float
    ) -> AsyncGenerator[Head | bytes]:
        try:
            async with asyncio.timeout_at(expires) as deadline:
                answered = await self._handlers.answer(request.kind, request.body, answer_id=request.answer_id)
        except (TimeoutError, Refused) as error:
            # vLLM answers what was cancelled with an error of its own.
            if isinstance(error, Refused) and not deadline.expired():
                yield Head(error.status, self._engine.version, self._name, error=error.error)
            else:
                yield self._late(request)
            return
        except WeightsError:
            yield self._elsewhere()
            return
        async with aclosing(answered.parts):
            if running.drained:
                yield self._elsewhere()
                return
            yield Head(200, answered.version, self._name)
            timer = asyncio.get_running_loop().call_at(expires, running.expire)
            try:
                async for part in answered.parts:
                    yield part
            finally:
                timer.cancel()

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises three times in a row."""
        if self._engine.broken:
            raise RuntimeError(f"{self._name}: engine is broken: {self._engine.broken}")
        self._core.look()
        if self._core.idle_s > SILENT_S:
            raise RuntimeError(f"{self._name}: the engine core has stood still for {self._core.idle_s:.0f} s")
        if self._following.done():
            raise RuntimeError(f"{self._name}: takes no new versions any more") from self._following.exception()

    def __del__(self) -> None:
        """Called by Ray Serve when what runs has finished, on the loop; again by Python, when nothing is left to do."""
        if "_following" in vars(self) and not self._following.cancelled():
            self._following.cancel()
            self._versions.leave.remote(self._settings.slot, self._name)
            self._wires.close()
        if "_engine" in vars(self):
            self._engine.shutdown()

    async def _catch_up(self) -> None:
        """Take versions until there is none that this slot should serve instead.

        Raises:
            NoAnswer: it did not come to that in `start_s`.
        """
        asked = f"say which version {self._settings.slot} serves"
        await answer(self._until_current(), who=KEEPER, asked=asked, deadline_s=self._settings.start_s)

    async def _until_current(self) -> None:
        while (order := await self._order(wait_s=0.0, starting=True)) is not None:
            await self._obey(order)

    async def _follow(self) -> None:
        """Ends with a broken engine."""
        while not self._engine.broken:
            try:
                order = await self._order(wait_s=_POLL_S)
                if order is not None:
                    await self._obey(order)
            except _ASKING as error:
                self._tell(Event("lost", KEEPER, first_line(error), f"{self._name} serves on and asks again"))
                await asyncio.sleep(_PAUSE_S)

    async def _order(self, *, wait_s: float, starting: bool = False) -> Order | None:
        asked = self._versions.order.remote(
            self._settings.slot, self._name, self._engine.version, self._gate.num_running, wait_s, starting=starting
        )
        order: Order | None = await answer(asked, who=KEEPER, asked="give orders", deadline_s=wait_s + _LATE_S)
        return order

    async def _obey(self, order: Order) -> None:
        """Serve what the order says, or as before; the keeper is told which."""
        refused = ""
        at_work = asyncio.create_task(self._say_at_work())
        try:
            await self._take(order)
        except (DeltaError, WeightsError, DrainError, NoAnswer, RayError) as error:
            refused = first_line(error)
            consequence = self._engine.broken or f"serves version {self._engine.version} and asks for a keyframe"
            self._tell(Event("refusal", self._name, f"version {order.version}: {refused}", consequence))
        finally:
            at_work.cancel()
        served = self._versions.served.remote(self._settings.slot, self._name, self._engine.version, refused)
        await answer(served, who=KEEPER, asked="note what is served", deadline_s=_LATE_S)

    async def _say_at_work(self) -> None:
        """Else the keeper gives the turn to another: whoever is silent has died."""
        while True:
            await asyncio.sleep(_AT_WORK_S)
            with suppress(*_ASKING):
                said = self._versions.at_work.remote(self._settings.slot, self._name)
                await answer(said, who=KEEPER, asked="hear a sign of life", deadline_s=_LATE_S)

    async def _take(self, order: Order) -> None:
        """Fetched, checked and written while requests run; only the exchange of weights waits for them to finish."""
        expires = time.monotonic() + order.deadline_s
        asked = f"hand over version {order.version}"
        fetch = asyncio.gather(*(asyncio.gather(*frames) for _, frames in order.steps))
        frames = await answer(fetch, who=KEEPER, asked=asked, deadline_s=order.deadline_s)
        updates = [update for update, _ in order.steps]

        def drained() -> AbstractAsyncContextManager[object]:
            if self._settings.config.allow_mixed:
                return nullcontext()
            drain_s = min(self._settings.config.drain_s, expires - time.monotonic() - _EXCHANGE_S)
            return self._gate.drained(alone=order.alone, drain_s=max(0.0, drain_s))

        deadline_s = expires - time.monotonic()
        times = await self._taking.take(order.version, updates, frames, deadline_s=deadline_s, exchange_in=drained)
        consequence = f"serves version {order.version}, held requests for {times.held_s:.2f} s"
        self._tell(Event("rollover", self._name, f"{len(updates)} updates from {KEEPER}", consequence))

    def _elsewhere(self) -> Head:
        return Head(503, self._engine.version, self._name, draining=True)

    def _not_here(self) -> Head:
        message = f"The weights of version {self._pinned} are not here yet. Ask again later, or for another version."
        error = {"message": message, "type": "server_error", "param": "model", "code": "version_not_here"}
        return Head(503, self._engine.version, self._name, error=error)

    def _late(self, request: PolicyRequest) -> Head:
        message = f"No token within {request.deadline_s:g} s: the server is busy. Ask again later, or for less."
        error = {"message": message, "type": "timeout_error", "param": None, "code": "timeout"}
        return Head(503, self._engine.version, self._name, error=error)

    def _tell(self, event: Event) -> None:
        _log.log(logging.INFO if event.event == "rollover" else logging.WARNING, "%s", event)


async def _written(said: AsyncIterator[Head | bytes]) -> AsyncIterator[bytes]:
    async for part in said:
        yield part.written() if isinstance(part, Head) else part


async def start_engine(
    config: ServingConfig, start: StartWeights, *, max_context_tokens: int, start_s: float
) -> Engine:
    """An engine of this application, with the weights that it begins with.

    Raises:
        RuntimeError: it did not come up.
    """
    replicas = config.replicas
    return await Engine.start(
        start.path,
        dtype=start.dtype,
        max_model_len=max_context_tokens,
        max_num_seqs=replicas.max_running,
        tensor_parallel_size=replicas.tensor_parallel_size,
        num_gpus=replicas.num_gpus,
        gpu_memory_utilization=replicas.gpu_memory_utilization,
        kv_cache_bytes=int(replicas.kv_cache_gib * 2**30),
        threads=replicas.threads,
        weights_version=start.version,
        adapters=replace(start.adapters, max_versions=_ADAPTERS) if start.adapters else None,
        start_timeout_s=start_s,
    )
