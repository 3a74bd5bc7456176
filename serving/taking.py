"""How an engine of this application comes to another version: by new weights in its shadow, or by a LoRA adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from torch import Tensor

from contracts.records import WeightsUpdate
from models.engine import Engine
from models.engine_update import UpdateTimes, WeightsError
from models.weight_stream import DeltaError, DeltaReceiver, read_tensors

KEEPER = "the version keeper"


class Taking:
    """Takes versions into `engine`. `receiver` holds its shadow; None: the engine was started for adapters."""

    def __init__(self, engine: Engine, receiver: DeltaReceiver | None, key: bytes | None) -> None:
        self._engine, self._receiver, self._key = engine, receiver, key

    @classmethod
    async def into(cls, engine: Engine, key: bytes | None) -> Taking:
        """`key` signs what comes."""
        if engine.takes_adapters:
            return cls(engine, None, key)
        return cls(engine, await asyncio.to_thread(DeltaReceiver, engine.shadow_tensors, engine.version, key=key), key)

    @property
    def held(self) -> int | None:
        """The version that an update may build on; None: it has to begin with a keyframe."""
        if self._receiver is None or self._receiver.version == self._engine.version:
            return self._engine.version
        return None

    def forget(self) -> None:
        """The next update has to begin with a keyframe."""
        if self._receiver is not None:
            self._receiver.forget()

    async def take(
        self,
        version: int,
        updates: Sequence[WeightsUpdate],
        frames: Sequence[Sequence[Any]],
        *,
        deadline_s: float,
        exchange_in: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
    ) -> UpdateTimes:
        """The updates of an order, one after the other; with a keyframe first, whatever is held.

        Weights are exchanged inside `exchange_in`. An adapter needs no exchange: answers that are being written keep
        the one that they began with.

        Raises:
            DeltaError: one of them was refused.
            WeightsError: the engine did not take what had arrived whole.
        """
        receiver = self._receiver
        if receiver is None:
            return await self._take_adapter(updates[-1], frames[-1], deadline_s)

        def write(tensors: Mapping[str, Tensor]) -> None:
            if updates[0].is_keyframe:
                receiver.forget()
            for update, its_frames in zip(updates, frames, strict=True):
                receiver.apply(its_frames, update=update, sender=KEEPER)

        return await self._engine.update(version, write, deadline_s=deadline_s, exchange_in=exchange_in)

    async def _take_adapter(self, update: WeightsUpdate, frames: Sequence[Any], deadline_s: float) -> UpdateTimes:
        """Each is whole: the last one is the version."""
        if not update.is_adapter:
            reason = "it is no adapter, and this engine takes nothing else"
            raise DeltaError(KEEPER, update.version, reason, needs_keyframe=False)
        tensors = await asyncio.to_thread(read_tensors, frames, update=update, sender=KEEPER, key=self._key)
        try:
            return await self._engine.load_adapter(update.version, tensors, deadline_s=deadline_s)
        except ValueError as error:
            raise WeightsError(str(error)) from error
