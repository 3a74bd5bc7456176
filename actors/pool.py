"""The rollout actors of a run: who is free, who holds which weights, and replacing those that die.

The pool decides nothing about prompts. An actor counts only after it has proved the newest published version;
one that dies or does not take new weights in time is killed and replaced in the background, after a pause that
doubles with each death in a row. After `max_deaths_in_a_row` the pool fails with the actor's own error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.rollout import RolloutActor, RolloutRequest
from contracts.clock import BusyClock
from contracts.config import DeadlinesConfig, ModelConfig, RolloutConfig
from contracts.records import Rollout, WeightsUpdate
from contracts.waiting import NoAnswer, answer
from models.engine_adapters import AdapterSettings

_FIRST_BACKOFF_S = 1.0
_FREE_POLL_S = 0.02


class WorkerLost(RuntimeError):
    """A rollout actor died or went silent while it held a request; the request can be sent to another."""


@dataclass(eq=False)
class Worker:
    """One rollout actor as the pool sees it; `busy` runs while it holds requests."""

    actor_id: str
    handle: Any
    version: int
    busy: BusyClock = field(default_factory=BusyClock)
    since: float = field(default_factory=time.monotonic)

    @property
    def running(self) -> int:
        return self.busy.active


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
        max_deaths_in_a_row: int = 3,
    ) -> None:
        self._model = model
        self._config = config
        self._deadlines = deadlines
        self._path = path
        self._path_version = version
        self._seed = seed
        self._adapters = adapters
        self._max_deaths_in_a_row = max_deaths_in_a_row
        self.on_change: Callable[[str], None] = lambda event: None
        self._latest: tuple[WeightsUpdate, list[ray.ObjectRef]] | None = None
        self._workers: list[Worker] = []
        self._starting: set[asyncio.Task[None]] = set()
        self._started = 0
        self._deaths_in_a_row = 0
        self.busy = BusyClock()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers)

    async def start(self) -> None:
        """Start all actors at once; returns when every one is ready.

        Raises:
            NoAnswer, RuntimeError: an actor did not come up; carries its own error.
        """
        await asyncio.gather(*(self._start_worker() for _ in range(self._config.num_workers)))

    def free(self, num_requests: int) -> Worker | None:
        """The least busy worker that has room for `num_requests` more, or None."""
        limit = max(self._config.max_concurrent, num_requests)
        workers = [worker for worker in self._workers if worker.running + num_requests <= limit]
        return min(workers, key=lambda worker: worker.running, default=None)

    async def generate(self, worker: Worker, request: RolloutRequest, *, deadline_s: float) -> Rollout:
        """One response from one worker.

        Raises:
            WorkerLost: the actor died; it is being replaced.
            NoAnswer: the response was not finished in time; it is cancelled, the worker stays.
        """
        ref = worker.handle.generate.remote(request)
        try:
            with worker.busy, self.busy:
                rollout: Rollout = await answer(
                    ref, who=f"rollout actor {worker.actor_id}", asked="finish a response", deadline_s=deadline_s
                )
        except RayActorError as error:
            self._lose(worker, error)
            raise WorkerLost(f"rollout actor {worker.actor_id} died") from error
        except (NoAnswer, asyncio.CancelledError):
            ray.cancel(ref)
            raise
        else:
            self._deaths_in_a_row = 0
            return rollout

    async def generate_somewhere(self, request: RolloutRequest, *, deadline_s: float) -> Rollout:
        """One response from any worker; waits for a free one and tries again where a worker died.

        Raises:
            NoAnswer: no worker finished it in time.
            RuntimeError: the pool has failed.
        """
        async with asyncio.timeout(deadline_s):
            while True:
                if self.failure.done():
                    self.failure.result()
                worker = self.free(1)
                if worker is None:
                    await asyncio.sleep(_FREE_POLL_S)
                    continue
                try:
                    return await self.generate(worker, request, deadline_s=deadline_s)
                except WorkerLost:
                    continue

    async def load_weights(self, update: WeightsUpdate, payload: list[ray.ObjectRef]) -> float:
        """Give every worker new weights, each driven by itself; those that fail are replaced.

        Returns the wall seconds for which requests were held, the largest over the engines.
        """
        self._latest = (update, payload)
        held = await asyncio.gather(*(self._update(worker, update, payload) for worker in self.workers))
        return max((seconds for seconds in held if seconds is not None), default=0.0)

    async def stop(self) -> None:
        """Stop all actors; those that do not answer in time are killed."""
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*(self._stop_worker(worker) for worker in self.workers))
        self._workers.clear()

    async def _start_worker(self) -> None:
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
        )
        try:
            version = await answer(
                handle.start.remote(seed=self._seed),
                who=f"rollout actor {actor_id}",
                asked="start its engine",
                deadline_s=self._deadlines.start_s,
            )
            worker = Worker(actor_id, handle, version)
            # Newest weights first: a fresh engine must never serve its initial ones as if they were current.
            while self._latest is not None and worker.version != self._latest[0].version:
                await self._load(worker, *self._latest)
        except BaseException:
            ray.kill(handle)
            raise
        self._workers.append(worker)
        self.on_change(f"{actor_id} serves version {worker.version}")

    async def _update(self, worker: Worker, update: WeightsUpdate, payload: list[ray.ObjectRef]) -> float | None:
        try:
            return await self._load(worker, update, payload)
        except (RayActorError, RayTaskError, NoAnswer) as error:
            self._lose(worker, error)
            return None

    async def _load(self, worker: Worker, update: WeightsUpdate, payload: list[ray.ObjectRef]) -> float:
        deadline_s = self._deadlines.weights_s
        held_s: float = await answer(
            worker.handle.load_weights.remote(update, payload, deadline_s=deadline_s),
            who=f"rollout actor {worker.actor_id}",
            asked=f"take weights version {update.version}",
            deadline_s=deadline_s,
        )
        worker.version = update.version
        return held_s

    def _lose(self, worker: Worker, error: Exception) -> None:
        """Take a worker out at once and start another in the background."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        ray.kill(worker.handle)
        self._deaths_in_a_row += 1
        self.on_change(f"{worker.actor_id} lost: {_first_line(error)}")
        task = asyncio.ensure_future(self._replace(error))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _replace(self, error: Exception) -> None:
        while self._deaths_in_a_row <= self._max_deaths_in_a_row:
            await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** (self._deaths_in_a_row - 1))
            try:
                return await self._start_worker()
            except (RayActorError, RayTaskError, NoAnswer) as again:
                error = again
                self._deaths_in_a_row += 1
                self.on_change(f"a new rollout actor did not start: {_first_line(again)}")
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
            )
        except (RayActorError, RayTaskError, NoAnswer) as error:
            self.on_change(f"{worker.actor_id} was killed: {_first_line(error)}")
        ray.kill(worker.handle)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
