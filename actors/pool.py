"""The rollout actors of a run: who is free, who holds which weights, and replacing those that die.

The pool decides nothing about prompts. A new actor counts only after it has proved the newest published version, and
is asked for nothing that its version is too old for; one that dies, falls silent or does not take new weights in time
is killed and replaced in the background, after a pause that doubles with each death in a row. One that must leave is
drained: another is started at once, while it finishes what it has. `resize` changes how many there should be; one that
no node has room for is told of and waited for, as long as others work. After `rollout.max_deaths_in_a_row` in one
place, with no response in between, the pool fails with the actor's own error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from transformers import AutoConfig

from actors.admission import BadRollout, check_rollout
from actors.delivery import Delivery, Published, WeightsRefused
from actors.mailbox import RolloutRequest
from actors.rollout import RolloutActor
from actors.roster import Roster, Used, WorkerCounts
from actors.starting import Starter
from actors.worker import NodeLeaves, Start, Worker, WorkerLost, cause_of
from contracts.clock import BusyClock, now
from contracts.config import DeadlinesConfig, ModelConfig
from contracts.events import Event
from contracts.records import Rollout, WeightsUpdate
from contracts.waiting import NoAnswer, answer
from contracts.workers import RolloutConfig
from models.engine import WeightsError
from models.engine_adapters import AdapterSettings

_FIRST_BACKOFF_S = 1.0
_FREE_POLL_S = 0.02


class RolloutPool:
    """Starts, feeds, updates and replaces rollout actors.

    Args:
        path: the model that the first actors start from, of weights `version`.
        base_path: the model of version 0, for those that start once a version was published: `path` may be a
            checkpoint, and older ones are removed. Default: `path`, as `version`.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: RolloutConfig,
        deadlines: DeadlinesConfig,
        *,
        path: str,
        version: int,
        seed: int,
        base_path: str | None = None,
        adapters: AdapterSettings | None = None,
        weights_key: bytes | None = None,
        actor_class: Any = RolloutActor,
        repeatable: bool = False,
    ) -> None:
        self._config = config
        self._deadlines = deadlines
        self._path = path
        self._path_version = version
        self._vocabulary = 0  # read at the start
        self.on_change: Callable[[Event], None] = lambda event: None
        self.on_update: Callable[[], None] = lambda: None  # a worker serves a newer version
        self._delivery = Delivery(deadline_s=deadlines.weights_s)
        self._delivery.on_event = lambda event: self.on_change(event)
        self._starter = Starter(
            model,
            config,
            deadlines,
            self._delivery,
            path=path,
            version=version,
            seed=seed,
            base_path=base_path,
            adapters=adapters,
            weights_key=weights_key,
            actor_class=actor_class,
            repeatable=repeatable,
            on_event=lambda event: self.on_change(event),
            on_lost=lambda worker, error: self._lose(worker, error),
            num_working=lambda: len(self.workers),
        )
        self._roster: Roster[Worker] = Roster(config.max_concurrent)
        self._target = config.num_workers
        self._starting: dict[Start, None] = {}  # in the order of their beginning
        self._draining: set[Worker] = set()
        self._leaving: set[asyncio.Task[None]] = set()  # because there are too many
        self.cold_start_s = 0.0  # of the last that came up, the wait for a node included
        self.busy = BusyClock()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Those that count, in order of arrival."""
        return self._roster.workers

    @property
    def size(self) -> int:
        """How many workers there should be."""
        return self._target

    def counts(self) -> WorkerCounts:
        """The workers by their state."""
        pending = sum(not start.placed for start in self._starting)
        return WorkerCounts(self._target, len(self._roster), len(self._starting), pending, len(self._draining))

    def used(self) -> Used:
        """Worker-seconds so far, and seconds of their places that were taken."""
        return self._roster.used()

    @property
    def newest_version(self) -> int:
        """The newest that any worker can serve: a response that names a later one is not ours."""
        newest = self._delivery.newest_version
        return self._path_version if newest is None else newest

    async def start(self) -> None:
        """Start all actors at once; returns when every one is ready, with `autoscale` when `min_workers` are.

        Raises:
            NoAnswer, RuntimeError: an actor did not come up; carries its own error.
        """
        self._vocabulary = await asyncio.to_thread(_vocabulary_of, self._path)
        needed = min(self._config.fewest_workers, self._config.num_workers)
        for index in range(needed, self._config.num_workers):
            self._start_another(index, "", 0)
        await asyncio.gather(*(self._start_worker(Start(index), must=True) for index in range(needed)))

    def resize(self, num_workers: int, *, cause: str) -> None:
        """Have so many workers from now on: others are started, or some leave, in the background.

        First those leave that do not serve yet, then those with the fewest requests; these finish what they have, for
        `deadlines.lease_s` at most.
        """
        change = f"{self._target} -> {num_workers} are wanted"
        self._target = num_workers
        self.on_change(Event("scale", "rollout workers", cause, change))
        for _ in range(num_workers - self._expected):
            self._start_another(self._free_index(), "", 0)
        newest_start_first = reversed(self._starting)
        for start in sorted(newest_start_first, key=lambda start: start.placed)[: self._num_too_many]:
            assert start.task is not None
            del self._starting[start]
            start.task.cancel()
        newest_first = reversed(self.workers)
        for worker in sorted(newest_first, key=self._roster.load)[: self._num_too_many]:
            leaving = self.drain(worker, cause=cause, deadline_s=self._deadlines.lease_s)
            task = asyncio.ensure_future(leaving)
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    @property
    def _expected(self) -> int:
        """Workers that serve or will."""
        return len(self._roster) + len(self._starting)

    @property
    def _num_too_many(self) -> int:
        return max(0, self._expected - self._target)

    def _free_index(self) -> int:
        taken = {worker.index for worker in self.workers} | {start.index for start in self._starting}
        return next(index for index in range(len(taken) + 1) if index not in taken)

    def reserve(self, num_requests: int, *, oldest_version: int = 0) -> Worker | None:
        """The least loaded worker with room that serves `oldest_version` or newer, places for the requests taken.

        Each place is given back by one `generate`.
        """
        return self._roster.reserve(num_requests, oldest_version=oldest_version)

    async def generate(self, worker: Worker, request: RolloutRequest, *, deadline_s: float) -> Rollout:
        """One response from one worker that has a place reserved for it.

        Raises:
            WorkerLost: the actor died, fell silent or was drained; it is being replaced.
            NoAnswer: the response was not finished in time; it is cancelled, the worker stays.
            BadRollout: what came back cannot be the response.
        """
        who, asked = f"rollout actor {worker.actor_id}", f"finish response {request.trajectory_id}"
        try:
            with worker.busy, self.busy:
                response = worker.line.fetch(request)
                rollout = await answer(response, who=who, asked=asked, deadline_s=deadline_s, node=worker.node)
        finally:
            self._roster.release(worker)
        newest, vocabulary = self.newest_version, self._vocabulary
        check_rollout(rollout, request, actor_id=worker.actor_id, newest_version=newest, vocabulary=vocabulary)
        worker.deaths = 0
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

    async def generate_together(
        self, index: int, requests: Sequence[RolloutRequest], *, deadline_s: float
    ) -> list[Rollout | BadRollout]:
        """A worker's share of a round, under the newest weights, in batches whose shapes repeat.

        Waits for the worker of that index to have them. One that dies, or has not answered after `deadline_s`, is
        replaced, and its replacement is asked for the whole share again, so that the bits are the same.

        Raises:
            NoAnswer: no worker of that index was ready in time, or none answered in `max_deaths_in_a_row` attempts.
            RuntimeError: the pool has failed.
        """
        attempt = 0
        while True:
            attempt += 1
            start_s = self._deadlines.start_s + self._deadlines.weights_s
            who, asked = f"rollout actor {index}", "be up with the newest weights"
            worker = await answer(self._worker_at(index), who=who, asked=asked, deadline_s=start_s)
            who, asked = f"rollout actor {worker.actor_id}", f"finish {len(requests)} responses of a round"
            try:
                with worker.busy, self.busy:
                    ref = worker.handle.generate_together.remote(list(requests), deadline_s=deadline_s)
                    try:
                        answers = await answer(ref, who=who, asked=asked, deadline_s=deadline_s, node=worker.node)
                    except asyncio.CancelledError:
                        ray.cancel(ref)
                        raise
            except (RayActorError, RayTaskError, NoAnswer) as error:
                if isinstance(error, RayTaskError) and not isinstance(error.cause, WeightsError):
                    raise
                self._lose(worker, error)
                if isinstance(error, NoAnswer) and attempt >= self._config.max_deaths_in_a_row:
                    raise
                continue
            worker.deaths = 0
            return [self._checked(worker, request, each) for request, each in zip(requests, answers, strict=True)]

    async def _worker_at(self, index: int) -> Worker:
        """The worker of that index, once it serves the newest weights."""
        while True:
            if self.failure.done():
                self.failure.result()
            for worker in self.workers:
                if worker.index == index and worker.version == self.newest_version:
                    return worker
            await asyncio.sleep(_FREE_POLL_S)

    def _checked(self, worker: Worker, request: RolloutRequest, said: Rollout | str) -> Rollout | BadRollout:
        if isinstance(said, str):
            return BadRollout(f"{worker.actor_id}: {said}")
        newest, vocabulary = self.newest_version, self._vocabulary
        try:
            check_rollout(said, request, actor_id=worker.actor_id, newest_version=newest, vocabulary=vocabulary)
        except BadRollout as bad:
            return bad
        return said

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

    async def drain(self, worker: Worker, *, cause: str, deadline_s: float) -> None:
        """Let a worker leave: it gets no new requests and another is started; what it has goes on for `deadline_s`.

        Requests that are unfinished then raise WorkerLost. Returns when the worker is stopped. No other is started
        where it was one too many.
        """
        if worker not in self._roster:
            return  # it is leaving already
        self._roster.remove(worker)
        self._draining.add(worker)
        held, who, node = worker.line.num_waiting, worker.actor_id, worker.node
        another = "another is started" if self._expected < self._target else "none is started in its place"
        consequence = f"gets no new requests, {held} running ones have {deadline_s:g} s; {another}"
        self.on_change(Event("drain", who, cause, consequence, node))
        if self._expected < self._target:
            self._start_another(worker.index, f"{who} had to leave", worker.deaths)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):
                    await worker.line.emptied()
            if not worker.line.closed:  # else it died meanwhile
                unfinished = worker.line.num_waiting
                self._disconnect(worker, WorkerLost(f"rollout actor {who} had to leave: {cause}"))
                await self._stop_worker(worker)
                consequence = f"stopped; {held - unfinished} requests were finished, {unfinished} go to others"
                self.on_change(Event("drain", who, cause, consequence, node))
        finally:
            self._draining.discard(worker)

    async def drain_node(self, node_id: str, cause: str, deadline_s: float) -> None:
        """Drain all workers of a Ray node; others are started elsewhere, if anything else has room."""
        self._starter.leaving_nodes.add(node_id)
        leaving = [worker for worker in self.workers if worker.node_id == node_id]
        await asyncio.gather(*(self.drain(worker, cause=cause, deadline_s=deadline_s) for worker in leaving))

    async def stop(self) -> None:
        """Stop all actors; those that do not answer in time are killed."""
        workers = (*self.workers, *self._draining)
        updates = [worker.update for worker in workers if worker.update is not None]
        for task in (*(start.task for start in self._starting if start.task is not None), *updates):
            task.cancel()
        for worker in workers:
            if worker in self._roster:
                self._roster.remove(worker)
            self._disconnect(worker, WorkerLost(f"rollout actor {worker.actor_id} is stopped with the run"))
        await asyncio.gather(*(self._stop_worker(worker) for worker in workers))

    async def _start_worker(self, start: Start, *, cause: str = "", deaths: int = 0, must: bool = False) -> None:
        """`cause`: why another one is needed. `must`: give up where it has no node after `deadlines.start_s`."""
        begun = now()
        worker = await self._starter.bring_up(start, deaths=deaths, must=must)
        worker.line.open()
        self._starting.pop(start, None)
        self._roster.add(worker)
        self.cold_start_s = now() - begun
        came = Event(
            "restart" if cause else "start", worker.actor_id, cause, f"serves version {worker.version}", worker.node
        )
        self.on_change(came)

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
        if worker.line.closed:
            return
        ray.kill(worker.handle)  # its engine core ends with it, also where one of them is stopped
        cause = cause_of(error)
        self._disconnect(worker, WorkerLost(f"rollout actor {worker.actor_id} was lost: {cause}"))
        if worker in self._draining:
            consequence = "it had to leave anyway; its requests go to others"
            self.on_change(Event("death", worker.actor_id, cause, consequence, worker.node))
            return
        self._roster.remove(worker)
        deaths = worker.deaths + 1
        consequence = "its requests go to others, another is started"
        if deaths > self._config.max_deaths_in_a_row:
            consequence = "none is started any more"
        elif self._expected >= self._target:
            consequence = "its requests go to others, there are enough of them"
        self.on_change(Event("death", worker.actor_id, cause, consequence, worker.node))
        if self._expected < self._target:
            self._start_another(worker.index, f"{worker.actor_id} was lost", deaths, error)

    def _disconnect(self, worker: Worker, error: WorkerLost) -> None:
        if worker.update is not None:
            worker.update.cancel()
        worker.line.close(error)

    def _start_another(self, index: int, cause: str, deaths: int, error: Exception | None = None) -> None:
        start = Start(index)
        self._starting[start] = None
        start.task = asyncio.ensure_future(self._replace(start, cause, deaths, error))
        start.task.add_done_callback(lambda task: self._starting.pop(start, None))

    async def _replace(self, start: Start, cause: str, deaths: int, error: Exception | None) -> None:
        while deaths <= self._config.max_deaths_in_a_row:
            if deaths:
                await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** (deaths - 1))
            try:
                return await self._start_worker(start, cause=cause, deaths=deaths)
            except (RayActorError, RayTaskError, NoAnswer, WeightsRefused, NodeLeaves) as again:
                error = again
                deaths += 1
        if not self.failure.done():
            message = f"rollout actors died {deaths} times in a row"
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
            self.on_change(Event("killed", worker.actor_id, cause_of(error), "it is gone", worker.node))
        ray.kill(worker.handle)


def _vocabulary_of(path: str) -> int:
    size: int = AutoConfig.from_pretrained(path).get_text_config().vocab_size
    return size
