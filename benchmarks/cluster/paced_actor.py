"""A rollout actor on the real line to the pool whose engine is paced: each response takes its time and no core.

It imports no model library, so that it is up in a second or two; the start of an engine is paced, too.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import ray

from actors.delivery import WeightsAnswer
from actors.mailbox import Finished, Mailbox, RolloutRequest, Started
from contracts.config import ModelConfig, RolloutConfig
from contracts.records import Rollout, WeightsUpdate

TOKENS = 8  # of every response: enough to tell old tokens from new ones
SPREAD = 0.5  # uniform within this share of the mean on either side


def pace(*, response_s: float, start_s: float) -> dict[str, str]:
    """The environment that sets an actor's pace: mean seconds of a response in a place, and of the engine's start."""
    return {"PACED_RESPONSE_S": str(response_s), "PACED_START_S": str(start_s)}


@ray.remote
class PacedActor:
    """Works on `rollout.max_concurrent` responses at once, at the pace of its environment."""

    def __init__(self, actor_id: str, model: ModelConfig, config: RolloutConfig, *, version: int, **more: Any) -> None:
        self._actor_id = actor_id
        self._version = version
        self._places = asyncio.Semaphore(config.max_concurrent)
        self._mailbox = Mailbox(self.generate)

    async def start(self, *, seed: int) -> Started:
        await asyncio.sleep(float(os.environ["PACED_START_S"]))
        return Started(self._version, ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())

    async def submit(self, requests: list[tuple[int, RolloutRequest]]) -> None:
        self._mailbox.submit(requests)

    async def cancel(self, numbers: list[int]) -> None:
        self._mailbox.cancel(numbers)

    async def finished(self, *, received: int, wait_s: float) -> Finished:
        return Finished(*await self._mailbox.unreceived(received=received, wait_s=wait_s))

    async def generate(self, request: RolloutRequest) -> Rollout:
        """A response takes as long wherever and however often it is asked for."""
        draw = random.Random(request.trajectory_id).uniform(1 - SPREAD, 1 + SPREAD)
        versions = []
        async with self._places:
            for _ in range(TOKENS):
                await asyncio.sleep(float(os.environ["PACED_RESPONSE_S"]) * draw / TOKENS)
                versions.append(self._version)
        return Rollout(
            trajectory_id=request.trajectory_id,
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            prompt_tokens=request.prompt_tokens,
            response_tokens=[0] * TOKENS,
            response_text="",
            behavior_logprobs=[-1.0] * TOKENS,
            weights_versions=versions,
            finish_reason="stop",
            actor_id=self._actor_id,
        )

    async def load_weights(self, update: WeightsUpdate, payload: object, *, deadline_s: float) -> WeightsAnswer:
        self._version = update.version
        return WeightsAnswer(update.version, 0.0)

    async def stop(self) -> None:
        """Nothing of it is left when its process ends."""
