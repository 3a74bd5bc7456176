"""An actor on the real line to the pool, whose engine does what a request's name says. It starts in a second."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from actors.delivery import WeightsAnswer
from actors.mailbox import Finished, Mailbox, RolloutRequest, Started
from contracts.records import Rollout
from models.engine_update import WeightsError

SILENT_S = 2.0


@ray.remote
class ScriptedActor:
    """`generate` obeys the trajectory's name: it answers at once, or holds, or fails."""

    def __init__(self, actor_id: str, *settings: Any, path: str, version: int, **more: Any) -> None:
        self.actor_id, self.version, self.began_with = actor_id, version, (path, version)
        self.mailbox = Mailbox(self.generate)
        self.asked: list[str] = []
        self.calls: list[str] = []
        self.cancelled: list[str] = []
        self.lose_next = False
        self.broken = ""
        self.unanswered_s = self.idle_s = 0.0

    async def start(self, *, seed: int) -> Started:
        return Started(self.version, "127.0.0.1", ray.get_runtime_context().get_node_id())

    async def submit(self, requests: Any) -> None:
        self.calls.append("submit")
        self.mailbox.submit(requests)

    async def cancel(self, numbers: Any) -> None:
        self.mailbox.cancel(numbers)

    async def finished(self, *, received: int, wait_s: float) -> Finished:
        first, answers = await self.mailbox.unreceived(received=received, wait_s=0 if self.broken else wait_s)
        if answers and self.lose_next:
            self.lose_next = False
            raise ActorUnavailableError("the connection broke", None)
        if answers:
            self.calls.append(f"{len(answers)} answers")
        return Finished(first, answers, self.broken, self.unanswered_s, self.idle_s)

    async def generate(self, request: RolloutRequest) -> Rollout:
        self.asked.append(request.trajectory_id)
        what = request.trajectory_id.partition("-")[0]
        if what == "refused":
            raise ValueError("too long a prompt")
        if what == "fails":
            raise KeyError("a bug of the actor")
        if what == "breaks":
            self.broken = "its core died: segmentation fault in layer 7"
            raise WeightsError(self.broken)
        try:
            while what == "held":
                await asyncio.sleep(0.01)
                if request.trajectory_id in self.calls:
                    break
        except asyncio.CancelledError:
            self.cancelled.append(request.trajectory_id)
            raise
        return Rollout(
            trajectory_id=request.trajectory_id,
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            prompt_tokens=request.prompt_tokens,
            response_tokens=[3],
            response_text="",
            behavior_logprobs=[-1.0],
            weights_versions=[self.version],
            finish_reason="stop",
            actor_id=self.actor_id,
        )

    async def load_weights(self, update: Any, payload: Any, *, deadline_s: float) -> WeightsAnswer:
        return WeightsAnswer(update.version, 0.0)

    async def stop(self) -> None:
        self.calls.append("stop")


def stop_process(actor: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def silence_core(actor: Any) -> None:
    actor.unanswered_s = actor.idle_s = SILENT_S + 0.5


def hang_core(actor: Any) -> None:
    """It computes, and answers nothing."""
    actor.unanswered_s = 3 * SILENT_S + 0.5
