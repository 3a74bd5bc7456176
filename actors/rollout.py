"""A rollout actor: one vLLM engine in a Ray actor.

It consumes single requests and answers each by itself, as soon as its response is finished (continuous batching).
It waits for nothing but its engine: callers set the deadline and cancel a request by cancelling the Ray task.
When the engine is dead or holds a mixture of weights the actor ends itself, so callers see an actor that died.
"""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray.actor import exit_actor
from transformers import AutoTokenizer

from contracts.config import ModelConfig, RolloutConfig
from contracts.records import Rollout, WeightsUpdate
from models.engine import Engine, WeightsError
from models.engine_adapters import AdapterSettings
from models.weights import digest


@dataclass(frozen=True)
class RolloutRequest:
    """One response to sample. `seed` makes the draw repeatable for equal batch shapes."""

    trajectory_id: str
    prompt_id: str
    group_id: str
    prompt_tokens: list[int]
    max_tokens: int
    temperature: float
    seed: int


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
    ) -> None:
        self._actor_id = actor_id
        self._model = model
        self._config = config
        self._path = path
        self._version = version
        self._adapters = adapters
        self._engine: Engine | None = None

    async def start(self, *, seed: int) -> int:
        """Load the model; returns the version that the engine serves."""
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
            adapters=self._adapters,
        )
        return self._engine.version

    async def generate(self, request: RolloutRequest) -> Rollout:
        """Sample one response; every token with its weights version and log-probability."""
        engine = self._running_engine()
        try:
            generation = await engine.generate(
                request.prompt_tokens,
                request_id=request.trajectory_id,
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                seed=request.seed,
            )
        except WeightsError:
            exit_actor()
            raise
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

    async def load_weights(self, update: WeightsUpdate, payload: list[ray.ObjectRef], *, deadline_s: float) -> float:
        """Take new weights, or a new adapter; returns the wall seconds for which requests were held.

        Raises:
            WeightsError: the digest of what arrived differs from the learner's; the engine is unharmed.
        """
        engine = self._running_engine()
        tensors = await payload[0]
        if digest(tensors) != update.digest:
            raise WeightsError(f"{self._actor_id}: version {update.version} arrived damaged (its digest differs)")
        load = engine.load_adapter if update.is_adapter else engine.load_weights
        try:
            return await load(update.version, tensors, deadline_s=deadline_s)
        finally:
            if engine.broken:
                exit_actor()

    async def stop(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError(f"{self._actor_id}: start was not called")
        return self._engine
