"""The rollout actors of a run: who is free, who holds which weights, and replacing those that die.

The pool decides nothing about prompts. A new actor counts only after it has proved the newest published version, and
is asked for nothing that its version is too old for; one that dies or does not take new weights in time is killed and
replaced in the background, after a pause that doubles with each death in a row. After `max_deaths_in_a_row` the pool
fails with the actor's own error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from transformers import AutoConfig

from actors.admission import BadRollout, check_rollout
from actors.delivery import Delivery, Published, WeightsRefused
from actors.rollout import RolloutActor, RolloutRequest
from actors.roster import Roster
from contracts.clock import BusyClock, now
from contracts.config import DeadlinesConfig, ModelConfig, RolloutConfig
from contracts.events import Event, first_line
from contracts.records import Rollout, WeightsUpdate
from contracts.waiting import NoAnswer, answer
from models.engine_adapters import AdapterSettings

_FIRST_BACKOFF_S = 1.0
_FREE_POLL_S = 0.02


class WorkerLost(RuntimeError):
    """A rollout actor died or went silent while it held a request; the request can be sent to another."""


@dataclass(eq=False)
class Worker:
    """One rollout actor as the pool sees it; `busy` runs while it holds requests.

    `version` is the one it has proved. `update` runs while it is brought to a newer one.
    """

    actor_id: str
    handle: Any
    version: int
    node: str = ""
    update: asyncio.Task[None] | None = None
    busy: BusyClock = field(default_factory=BusyClock)
    since: float = field(default_factory=now)


class RolloutPool:
    """Starts, feeds, updates and replaces rollout actors."""

    def __init__(
        self,
        model: ModelConfig,
        config: RolloutConfig,
        deadlines: DeadlinesConfig,
        *,
        path: str,
        version: int,
        seed: int,
        adapters: AdapterSettings | None = None,
        weights_key: bytes | None = None,
        max_deaths_in_a_row: int = 3,
    ) -> None:
        self._model = model
        self._config = config
        self._deadlines = deadlines
        self._path = path
        self._path_version = version
        self._seed = seed
        self._vocabulary = 0  # read at the start
        self._adapters = adapters
        self._weights_key = weights_key
        self._max_deaths_in_a_row = max_deaths_in_a_row
        self.on_change: Callable[[Event], None] = lambda event: None
        self.on_update: Callable[[], None] = lambda: None  # a worker serves a newer version
        self._delivery = Delivery(deadline_s=deadlines.weights_s)
        self._delivery.on_event = lambda event: self.on_change(event)
        self._roster: Roster[Worker] = Roster(config.max_concurrent)
        self._starting: set[asyncio.Task[None]] = set()
        self._started = 0
        self._deaths_in_a_row = 0
        self.busy = BusyClock()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Those that count, in order of arrival."""
        return self._roster.workers

    @property
    def newest_version(self) -> int:
        """The newest that any worker can serve: a response that names a later one is not ours."""
        newest = self._delivery.newest_version
        return self._path_version if newest is None else newest

    async def start(self) -> None:
        """Start all actors at once; returns when every one is ready.

        Raises:
            NoAnswer, RuntimeError: an actor did not come up; carries its own error.
        """
        self._vocabulary = await asyncio.to_thread(_vocabulary_of, self._path)
        await asyncio.gather(*(self._start_worker() for _ in range(self._config.num_workers)))

    def reserve(self, num_requests: int, *, oldest_version: int = 0) -> Worker | None:
        """The least loaded worker with room that serves `oldest_version` or newer, places for the requests taken.

        Each place is given back by one `generate`.
        """
        return self._roster.reserve(num_requests, oldest_version=oldest_version)

    async def generate(self, worker: Worker, request: RolloutRequest, *, deadline_s: float) -> Rollout:
        """One response from one worker that has a place reserved for it.

        Raises:
            WorkerLost: the actor died; it is being replaced.
            NoAnswer: the response was not finished in time; it is cancelled, the worker stays.
            BadRollout: what came back cannot be the response.
        """
        try:
            with worker.busy, self.busy:
                ref = worker.handle.generate.remote(request)
                try:
                    who, asked = f"rollout actor {worker.actor_id}", f"finish response {request.trajectory_id}"
                    rollout: Rollout = await answer(ref, who=who, asked=asked, deadline_s=deadline_s, node=worker.node)
                except (NoAnswer, asyncio.CancelledError):
                    ray.cancel(ref)
                    raise
        except RayActorError as error:
            self._lose(worker, error)
            raise WorkerLost(f"rollout actor {worker.actor_id} died") from error
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise BadRollout(f"{worker.actor_id}: {error.cause}") from error
            raise
        finally:
            self._roster.release(worker)
        newest, vocabulary = self.newest_version, self._vocabulary
        check_rollout(rollout, request, actor_id=worker.actor_id, newest_version=newest, vocabulary=vocabulary)
        self._deaths_in_a_row = 0
        return rollout

    async def generate_somewhere(self, request: RolloutRequest, *, deadline_s: float) -> Rollout:
        """One response under the newest weights; waits for a free worker and tries again where one died.

        Raises:
            NoAnswer: no worker finished it in time.
            RuntimeError: the pool has failed.
        """
        async with asyncio.timeout(deadline_s):
            while True:
                if self.failure.done():
                    self.failure.result()
                worker = self.reserve(1, oldest_version=self._delivery.newest_version or 0)
                if worker is None:
                    await asyncio.sleep(_FREE_POLL_S)
                    continue
                try:
                    return await self.generate(worker, request, deadline_s=deadline_s)
                except WorkerLost:
                    continue

    def publish(self, update: WeightsUpdate, payload: list[ray.ObjectRef]) -> None:
        """Bring new weights to every worker, in the background; those that do not take them are replaced."""
        self._delivery.publish(update, payload)
        for worker in self.workers:
            self._bring_up_to_date(worker)

    def keyframes_from(self, ask: Callable[[], Awaitable[Published]]) -> None:
        """Who gives the last published version complete, for workers that came late or missed one."""
        self._delivery.ask_keyframe = ask

    def take_delivery_costs(self) -> dict[str, float]:
        """Metrics of the deliveries since the last call."""
        return self._delivery.take_costs()

    async def stop(self) -> None:
        """Stop all actors; those that do not answer in time are killed."""
        workers = self.workers
        updates = [worker.update for worker in workers if worker.update is not None]
        for task in (*self._starting, *updates):
            task.cancel()
        for worker in workers:
            self._roster.remove(worker)
        await asyncio.gather(*(self._stop_worker(worker) for worker in workers))

    async def _start_worker(self, *, instead_of: str = "") -> None:
        actor_id = f"rollout-{self._started}"
        self._started += 1
        handle = RolloutActor.options(  # type: ignore[attr-defined]
            num_cpus=self._config.num_cpus, num_gpus=self._config.num_gpus
        ).remote(
            actor_id,
            self._model,
            self._config,
            path=self._path,
            version=self._path_version,
            adapters=self._adapters,
            weights_key=self._weights_key,
        )
        try:
            version, node = await answer(
                handle.start.remote(seed=self._seed),
                who=f"rollout actor {actor_id}",
                asked="start its engine",
                deadline_s=self._deadlines.start_s,
            )
            worker = Worker(actor_id, handle, version, node)
            # Newest weights first: a fresh engine must never serve its initial ones as if they were current.
            await self._delivery.bring_up_to_date(worker)
        except BaseException as error:
            ray.kill(handle)
            if isinstance(error, Exception):
                self.on_change(Event("start_failed", actor_id, first_line(error), "it was killed"))
            raise
        self._roster.add(worker)
        serves = f"serves version {worker.version}"
        if instead_of:
            self.on_change(Event("restart", actor_id, f"{instead_of} was lost", serves, node))
        else:
            self.on_change(Event("start", actor_id, "", serves, node))

    def _bring_up_to_date(self, worker: Worker) -> None:
        if worker.update is not None and not worker.update.done():
            return  # it goes on until nothing newer is there
        worker.update = asyncio.get_running_loop().create_task(self._update(worker))

    async def _update(self, worker: Worker) -> None:
        try:
            await self._delivery.bring_up_to_date(worker)
        except Exception as error:  # noqa: BLE001 whatever it is, this worker does not serve the newest weights
            self._lose(worker, error)
        else:
            self._roster.updated(worker)
            self.on_update()

    def _lose(self, worker: Worker, error: Exception) -> None:
        """Take a worker out at once and start another in the background."""
        if worker not in self._roster:
            return
        self._roster.remove(worker)
        if worker.update is not None:
            worker.update.cancel()
        ray.kill(worker.handle)
        self._deaths_in_a_row += 1
        consequence = "its requests go to others, another is started"
        if self._deaths_in_a_row > self._max_deaths_in_a_row:
            consequence = "none is started any more"
        self.on_change(Event("death", worker.actor_id, first_line(error), consequence, worker.node))
        task = asyncio.ensure_future(self._replace(worker, error))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _replace(self, lost: Worker, error: Exception) -> None:
        while self._deaths_in_a_row <= self._max_deaths_in_a_row:
            await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** (self._deaths_in_a_row - 1))
            try:
                return await self._start_worker(instead_of=lost.actor_id)
            except (RayActorError, RayTaskError, NoAnswer, WeightsRefused) as again:
                error = again
                self._deaths_in_a_row += 1
        if not self.failure.done():
            message = f"rollout actors died {self._deaths_in_a_row} times in a row"
            self.failure.set_exception(RuntimeError(f"{message}; the last error: {error}"))
        return None

    async def _stop_worker(self, worker: Worker) -> None:
        try:
            await answer(
                worker.handle.stop.remote(),
                who=f"rollout actor {worker.actor_id}",
                asked="stop",
                deadline_s=self._deadlines.stop_s,
                node=worker.node,
            )
        except (RayActorError, RayTaskError, NoAnswer) as error:
            self.on_change(Event("killed", worker.actor_id, first_line(error), "it is gone", worker.node))
        ray.kill(worker.handle)


def _vocabulary_of(path: str) -> int:
    size: int = AutoConfig.from_pretrained(path).get_text_config().vocab_size
    return size
