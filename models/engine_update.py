"""What an update of an engine's weights needs beside the engine: its error, its times, and its calls.

Every call to the engine core has a deadline, so that a lost answer cannot leave the engine paused for ever.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

# After a failed update: how long the engine core may take to say which weights it holds, and to resume.
RECOVERY_S = 20.0


class WeightsError(RuntimeError):
    """An update of the weights failed, or the engine is broken by an earlier failure."""


@dataclass(frozen=True)
class UpdateTimes:
    """Where the wall seconds of one update went.

    `write_s` is before the pause: weights are written to the shadow, or an adapter to its folder, and generation goes
    on. Then requests are held: until the engine stands still, while its workers load, until it has resumed.
    """

    write_s: float
    pause_s: float
    load_s: float
    resume_s: float

    @property
    def held_s(self) -> float:
        """Wall seconds in which requests were held."""
        return self.pause_s + self.load_s + self.resume_s


async def answer(llm: AsyncLLM, awaitable: Awaitable[T], call: str, expires: float) -> T:
    """The engine core's answer to `call`.

    Raises WeightsError when `expires` (monotonic seconds) has passed, vLLM's EngineDeadError when the core has died.
    """
    asked = asyncio.ensure_future(awaitable)
    try:
        while (remaining_s := expires - time.monotonic()) > 0:
            # vLLM leaves a call to a core that dies unanswered, so look after it meanwhile.
            done, _ = await asyncio.wait({asked}, timeout=min(remaining_s, 0.5))
            if done:
                return asked.result()
            if llm.errored:
                raise llm.dead_error
    finally:
        asked.cancel()
    raise WeightsError(f"vLLM's engine core (child of process {os.getpid()}) did not answer {call} before the deadline")


async def exchange(llm: AsyncLLM, version: int, *, expires: float, clear_cache: bool) -> tuple[float, float, float]:
    """Pause, let the workers load the shadow, name its version, resume; returns the seconds of pause, load, resume.

    Raises what a worker raised, or as `answer`: then `resume_whole` has to follow.
    """
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    began = time.monotonic()
    pause = llm.pause_generation(mode="keep", clear_cache=clear_cache)
    await answer(llm, pause, "pause_generation", expires)
    paused = time.monotonic()
    await answer(llm, llm.start_weight_update(), "start_weight_update", expires)
    request = WeightTransferUpdateRequest({"version": version})
    await answer(llm, llm.update_weights(request), "update_weights", expires)
    loaded = time.monotonic()
    finish = llm.finish_weight_update(weight_version=str(version))
    await answer(llm, finish, "finish_weight_update", expires)
    await answer(llm, llm.resume_generation(), "resume_generation", expires)
    return paused - began, loaded - paused, time.monotonic() - loaded


async def resume_whole(llm: AsyncLLM, versions: set[int]) -> int:
    """Resume where every worker holds the whole weights of one of `versions`, under its name, and return it.

    Waits RECOVERY_S. Raises WeightsError where the workers hold anything else, or as `answer`: then the engine stays
    paused, and what it holds is not to be served.
    """
    expires = time.monotonic() + RECOVERY_S
    held = set(await answer(llm, llm.collective_rpc("headrace_end_update"), "end_update", expires))
    if len(held) != 1 or not held <= versions:
        raise WeightsError(f"workers hold weights {sorted(held, key=str)}, expected one of {sorted(versions)}")
    whole = held.pop()
    await answer(llm, llm.update_weight_version(str(whole)), "update_weight_version", expires)
    await answer(llm, llm.resume_generation(), "resume_generation", expires)
    return int(whole)
