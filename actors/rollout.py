"""A rollout actor: one vLLM engine in a Ray actor.

It consumes requests, several in one call, and hands each response over as soon as it is finished (continuous
batching) to whoever polls for it. It waits for nothing but its engine: callers set the deadline and cancel a request by
its number. When the engine is dead or holds a mixture of weights, or its core does not answer, the next poll says so,
and the pool kills the actor.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from transformers import AutoTokenizer

from actors.delivery import WeightsAnswer
from actors.mailbox import Finished, Mailbox, RolloutRequest, Started
from contracts.config import ModelConfig
from contracts.records import Rollout, WeightsUpdate
from contracts.waiting import answer
from contracts.workers import RolloutConfig
from models.engine import Engine
from models.engine_adapters import AdapterSettings
from models.engine_core import CoreWatch
from models.engine_requests import Generation, SamplingRequest
from models.weight_stream import DeltaError, DeltaReceiver, read_tensors

SENDER = "learner rank 0"
_LAST_WORDS_BYTES = 4000


@ray.remote
class RolloutActor:
    """Samples responses and takes new weights between and in the middle of them."""

    def __init__(
        self,
        actor_id: str,
        model: ModelConfig,
        config: RolloutConfig,
        *,
        path: str,
        version: int,
        adapters: AdapterSettings | None = None,
        weights_key: bytes | None = None,
        repeatable: bool = False,
    ) -> None:
        self._actor_id = actor_id
        self._repeatable = repeatable
        self._model = model
        self._config = config
        self._path = path
        self._version = version
        self._adapters = adapters
        self._weights_key = weights_key
        self._engine: Engine | None = None
        self._core: CoreWatch | None = None
        self._receiver: DeltaReceiver | None = None
        self._mailbox = Mailbox(self.generate)

    async def start(self, *, seed: int) -> Started:
        """Load the model."""
        self._tokenizer = AutoTokenizer.from_pretrained(self._path)
        self._engine = await Engine.start(
            self._path,
            dtype=self._model.dtype,
            max_model_len=self._model.max_context_tokens,
            max_num_seqs=self._config.max_concurrent,
            tensor_parallel_size=self._config.tensor_parallel_size,
            num_gpus=self._config.num_gpus,
            gpu_memory_utilization=self._config.gpu_memory_utilization,
            kv_cache_bytes=int(self._config.kv_cache_gib * 2**30),
            threads=self._config.threads,
            seed=seed,
            weights_version=self._version,
            repeatable=self._repeatable,
            adapters=self._adapters,
        )
        self._core = CoreWatch(self._engine.ping, self._engine.core_computed_s)
        if self._adapters is None:
            tensors, version = self._engine.shadow_tensors, self._engine.version
            self._receiver = await asyncio.to_thread(DeltaReceiver, tensors, version, key=self._weights_key)
        context = ray.get_runtime_context()
        return Started(self._engine.version, ray.util.get_node_ip_address(), context.get_node_id())

    async def submit(self, requests: Sequence[tuple[int, RolloutRequest]]) -> None:
        """Begin with (number, request) pairs; see Mailbox."""
        self._mailbox.submit(requests)

    async def cancel(self, numbers: Sequence[int]) -> None:
        """Abort these requests in the engine; they get no answer."""
        self._mailbox.cancel(numbers)

    async def finished(self, *, received: int, wait_s: float) -> Finished:
        """All answers after the first `received`, at once if there are any, else as soon as one is there.

        Empty after `wait_s`, or when the engine breaks.
        """
        engine, core = self._running_engine(), self._core
        assert core is not None
        core.look()
        first, answers = await self._mailbox.unreceived(received=received, wait_s=0.0 if engine.broken else wait_s)
        broken = f"{engine.broken}\n{_last_words()}" if engine.broken else ""
        return Finished(first, answers, broken, core.unanswered_s, core.idle_s)

    async def generate(self, request: RolloutRequest) -> Rollout:
        """Sample one response; every token with its weights version and log-probability.

        Raises:
            ValueError: the model cannot take this prompt.
            WeightsError: the engine is broken.
        """
        generation = await self._running_engine().generate(
            request.prompt_tokens,
            request_id=request.trajectory_id,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
        return self._rollout(request, generation)

    async def generate_together(self, requests: list[RolloutRequest], *, deadline_s: float) -> list[Rollout | str]:
        """A share of a round, in batches whose shapes repeat; a text says why there is no response to its request.

        Raises:
            WeightsError: the engine is broken.
        """
        asked = [
            SamplingRequest(
                request.trajectory_id, request.prompt_tokens, request.max_tokens, request.temperature, request.seed
            )
            for request in requests
        ]
        generations = await self._running_engine().generate_together(asked, deadline_s=deadline_s)
        return [
            str(generation) if isinstance(generation, ValueError) else self._rollout(request, generation)
            for request, generation in zip(requests, generations, strict=True)
        ]

    def _rollout(self, request: RolloutRequest, generation: Generation) -> Rollout:
        if generation.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"{request.trajectory_id}: the engine ended it with {generation.finish_reason!r}")
        return Rollout(
            trajectory_id=request.trajectory_id,
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            prompt_tokens=request.prompt_tokens,
            response_tokens=generation.response_tokens,
            response_text=str(self._tokenizer.decode(generation.response_tokens, skip_special_tokens=True)),
            behavior_logprobs=generation.behavior_logprobs,
            weights_versions=generation.weights_versions,
            finish_reason="stop" if generation.finish_reason == "stop" else "length",
            actor_id=self._actor_id,
        )

    async def load_weights(
        self, update: WeightsUpdate, payload: list[ray.ObjectRef], *, deadline_s: float
    ) -> WeightsAnswer:
        """Take new weights, or a new adapter. Fetched, decoded and checked while generation goes on.

        What is damaged, forged, out of order or meant for others is refused, and the engine serves on as before.

        Raises:
            WeightsError: the engine did not take weights that had arrived whole.
        """
        engine, expires = self._running_engine(), time.monotonic() + deadline_s
        try:
            frames = await answer(
                asyncio.gather(*payload), who=SENDER, asked=f"hand over version {update.version}", deadline_s=deadline_s
            )
        except RayError as error:  # they die with the process that put them
            reason = f"version {update.version} from {SENDER} is lost: {type(error).__name__}"
            return WeightsAnswer(engine.version, 0.0, refused=reason)
        try:
            times = await self._take(engine, update, frames, deadline_s=expires - time.monotonic())
        except DeltaError as error:
            return WeightsAnswer(engine.version, 0.0, refused=str(error))
        return WeightsAnswer(engine.version, times.held_s)

    async def _take(self, engine: Engine, update: WeightsUpdate, frames: list[Any], *, deadline_s: float) -> Any:
        if update.is_adapter:
            adapter = await asyncio.to_thread(read_tensors, frames, update=update, sender=SENDER, key=self._weights_key)
            return await engine.load_adapter(update.version, adapter, deadline_s=deadline_s)
        receiver = self._receiver
        assert receiver is not None
        return await engine.update(
            update.version,
            lambda tensors: receiver.apply(frames, update=update, sender=SENDER),
            deadline_s=deadline_s,
            clear_cache=self._config.kv_cache_on_update == "recompute",
        )

    async def stop(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError(f"{self._actor_id}: start was not called")
        return self._engine


def _last_words() -> str:
    """The end of what this process and its engine core wrote to stderr, which Ray sends to a file."""
    path = os.readlink("/proc/self/fd/2")
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - _LAST_WORDS_BYTES))
        return log.read().decode(errors="replace")
