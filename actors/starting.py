"""How a rollout actor comes up: where, from which weights, and what is told while no node takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from actors.delivery import Delivery
from actors.line import Line
from actors.mailbox import Started
from actors.placement import missing
from actors.worker import NodeLeaves, Start, Worker, cause_of
from contracts.clock import now
from contracts.config import DeadlinesConfig, ModelConfig
from contracts.events import Event
from contracts.waiting import NoAnswer, answer
from contracts.workers import RolloutConfig
from models.engine_adapters import AdapterSettings


class Starter:
    """Brings rollout actors up, each once; whether another is worth trying is the pool's to decide.

    `leaving_nodes`, by Ray's ids, are being drained: an actor goes there only where nothing else has room, and one
    that came up there is killed.

    Args:
        path, version, base_path: as of `RolloutPool`.
        on_event: is told what waits for a node, and what did not start.
        on_lost: is told of a worker that was lost after it came up.
        num_working: how many workers serve meanwhile; as long as there are any, one without a node is waited for.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: RolloutConfig,
        deadlines: DeadlinesConfig,
        delivery: Delivery,
        *,
        path: str,
        version: int,
        seed: int,
        base_path: str | None,
        adapters: AdapterSettings | None,
        weights_key: bytes | None,
        actor_class: Any,
        repeatable: bool,
        on_event: Callable[[Event], None],
        on_lost: Callable[[Worker, Exception], None],
        num_working: Callable[[], int],
    ) -> None:
        self._model = model
        self._config = config
        self._deadlines = deadlines
        self._delivery = delivery
        self._path = path
        self._path_version = version
        self._seed = seed
        self._base_path = base_path
        self._adapters = adapters
        self._weights_key = weights_key
        self._actor_class = actor_class
        self._repeatable = repeatable
        self._on_event = on_event
        self._on_lost = on_lost
        self._num_working = num_working
        self._started = 0
        self.leaving_nodes: set[str] = set()

    async def bring_up(self, start: Start, *, deaths: int, must: bool) -> Worker:
        """A worker that has proved the newest weights; its line is not open yet.

        `must`: give up where it has no node after `deadlines.start_s`.

        Raises:
            NoAnswer: it has no node, or was not ready in time.
            NodeLeaves: it came up on a node that is being drained.
            WeightsRefused, RayActorError, RayTaskError: it died, or did not take the weights.
        """
        index = start.index
        # Of a repeatable run every file is the same, however often a worker was replaced.
        actor_id = f"rollout-{index if self._repeatable else self._started}"
        self._started += 1
        path, version, adapters = self._start_from()
        handle = self._actor_class.options(
            num_cpus=self._config.num_cpus,
            num_gpus=self._config.num_gpus,
            resources=self._config.resources,
            **self._placement(),
        ).remote(
            actor_id,
            self._model,
            self._config,
            path=path,
            version=version,
            adapters=adapters,
            weights_key=self._weights_key,
            repeatable=self._repeatable,
        )
        start.placed = False
        try:
            await self._placed(actor_id, handle, must=must)
            start.placed = True
            started: Started = await answer(
                handle.start.remote(seed=self._seed),
                who=f"rollout actor {actor_id}",
                asked="start its engine",
                deadline_s=self._deadlines.start_s,
            )
            node, node_id = started.node, started.node_id
            if node_id in self.leaving_nodes:
                raise NodeLeaves(f"rollout actor {actor_id} came up on node {node}, which is being drained")
            line = Line(
                actor_id, handle, self._deadlines, node=node, on_lost=lambda error: self._on_lost(worker, error)
            )
            worker = Worker(actor_id, handle, started.version, line, node, node_id, deaths, index)
            # Newest weights first: a fresh engine must never serve its initial ones as if they were current.
            await self._delivery.bring_up_to_date(worker)
        except BaseException as error:
            ray.kill(handle)
            if isinstance(error, Exception):
                self._on_event(Event("start_failed", actor_id, cause_of(error), "it was killed"))
            raise
        return worker

    async def _placed(self, actor_id: str, handle: Any, *, must: bool) -> None:
        """Wait for the actor's process, after `deadlines.place_s` aloud: for as long as others work, unless `must`.

        Raises:
            NoAnswer: it has no node after `deadlines.start_s`, and nobody works; says what is missing.
        """
        who, begun = f"rollout actor {actor_id}", now()
        up, lacks = handle.__ray_ready__.remote(), ""
        while True:
            wait_s = min(self._deadlines.place_s, self._deadlines.start_s)
            try:
                await answer(up, who=who, asked="be placed on a node", deadline_s=wait_s)
                return
            except NoAnswer as error:
                told, lacks = lacks, await self._what_is_missing()
                if not told:
                    working = f"{others} others work" if (others := self._num_working()) else "no other works yet"
                    self._on_event(Event("pending", who, lacks, working))
                if now() - begun >= self._deadlines.start_s and (must or not self._num_working()):
                    raise NoAnswer(f"{who} {lacks}: no node took it in {now() - begun:.0f} s") from error

    async def _what_is_missing(self) -> str:
        asked = {"CPU": self._config.num_cpus, "GPU": self._config.num_gpus, **self._config.resources}
        return await missing(asked, deadline_s=self._deadlines.nodes_s)

    def _start_from(self) -> tuple[str, int, AdapterSettings | None]:
        """The model folder, its version, and the adapters that a new actor begins with."""
        if self._base_path is None or self._delivery.newest_version is None:
            return self._path, self._path_version, self._adapters
        return self._base_path, 0, replace(self._adapters, initial=None) if self._adapters else None

    def _placement(self) -> dict[str, Any]:
        """Away from nodes that are being drained, as long as anything else has room."""
        if not self.leaving_nodes:
            return {}
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(self.leaving_nodes))})"}
        return {"label_selector": elsewhere, "fallback_strategy": [{"label_selector": {}}]}
