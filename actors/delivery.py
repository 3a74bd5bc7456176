"""New weights on their way to the rollout actors: each is driven by itself, with a deadline, to the newest version.

A worker gets the delta where it holds the base of it, and a keyframe where it missed a version or refused the delta.
One that takes neither in time is the pool's to replace; nothing here waits for more than one worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from contracts.events import Event
from contracts.records import WeightsUpdate
from contracts.waiting import answer

Published = tuple[WeightsUpdate, list["ray.ObjectRef"]]


@dataclass(frozen=True)
class WeightsAnswer:
    """What a worker says to an update: `refused` is the reason why it serves on as before, empty if it took it."""

    version: int
    held_s: float
    refused: str = ""


class WeightsRefused(RuntimeError):
    """A worker took neither delta nor keyframe."""


class Receiver(Protocol):
    """A worker as the delivery sees it."""

    actor_id: str
    handle: Any
    version: int
    node: str


class Delivery:
    """The newest published weights, and what it cost to bring them to the workers."""

    def __init__(self, *, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._newest: Published | None = None
        self._keyframe: asyncio.Future[Published] | None = None
        self.newest_version: int | None = None  # None: workers serve what they started with
        self._held_s = 0.0
        self._keyframe_bytes = 0
        # Who makes keyframes of the last published version: the learner, once it is up.
        self.ask_keyframe: Callable[[], Awaitable[Published]] | None = None
        self.on_event: Callable[[Event], None] = lambda event: None  # weights taken, or refused

    def publish(self, update: WeightsUpdate, payload: list[ray.ObjectRef]) -> None:
        """What `bring_up_to_date` delivers from now on."""
        self._newest, self._keyframe = (update, payload), None
        self.newest_version = update.version

    async def bring_up_to_date(self, worker: Receiver) -> None:
        """Give `worker` what it lacks until it serves the newest version.

        Raises:
            NoAnswer: it did not take an update within the deadline, or nobody made the keyframe that it needs.
            WeightsRefused: it refused a keyframe too.
            RayActorError, RayTaskError: it died, or its engine did not take the weights.
        """
        refused = False
        while self._newest is not None and worker.version < self._newest[0].version:
            update, payload = self._newest
            keyframe = refused or update.base_version not in (None, worker.version)
            if keyframe:
                update, payload = await self._newest_keyframe()
            said: WeightsAnswer = await answer(
                worker.handle.load_weights.remote(update, payload, deadline_s=self._deadline_s),
                who=f"rollout actor {worker.actor_id}",
                asked=f"take weights version {update.version}",
                deadline_s=self._deadline_s,
                node=worker.node,
            )
            self._keyframe_bytes += update.num_bytes * keyframe
            self._held_s = max(self._held_s, said.held_s)
            worker.version, refused = said.version, bool(said.refused)
            if refused:
                if update.base_version is None:
                    raise WeightsRefused(f"{worker.actor_id} refused complete weights: {said.refused}")
                self.on_event(Event("refusal", worker.actor_id, said.refused, "is sent a keyframe"))
            else:
                sent = f"{'keyframe' if update.is_keyframe else 'delta'} of {update.num_bytes} bytes"
                consequence = f"serves version {worker.version}, held requests for {said.held_s:.2f} s"
                self.on_event(Event("rollover", worker.actor_id, sent, consequence))

    def take_costs(self) -> dict[str, float]:
        """Since the last call: the longest time that one engine held requests, and bytes of keyframes delivered."""
        costs = {"generation_paused_s": self._held_s, "broadcast_keyframe_bytes": self._keyframe_bytes}
        self._held_s, self._keyframe_bytes = 0.0, 0
        return costs

    async def _newest_keyframe(self) -> Published:
        """Made once for all who need it; shielded, because each of them may give up by itself."""
        if self._keyframe is None:
            if self.ask_keyframe is None:
                raise WeightsRefused("a worker needs a keyframe, and there is no learner to make one")
            self._keyframe = asyncio.ensure_future(self.ask_keyframe())
        asked = self._keyframe
        try:
            update, payload = await asyncio.shield(asked)
        except Exception:
            if self._keyframe is asked:
                self._keyframe = None  # the next who needs it asks again
            raise
        if self.newest_version is None or update.version > self.newest_version:
            self.newest_version = update.version  # the learner was faster than the news of its publication
        elif update.version < self.newest_version:
            self._keyframe = None  # it was asked for before the newest version was out
        return update, payload
