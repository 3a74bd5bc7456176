"""Reference log-probabilities as a Ray Serve deployment: the policy's starting point, never updated.

A replica consumes single responses as token ids (never text: another tokenisation would be other tokens), batches
what arrives together, and answers each by itself.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import AutoModelForCausalLM

from actors.applications import run_application
from actors.replicas import ask, health_checks
from contracts.workers import ReplicaConfig
from models.forward import check_supported, response_logprobs
from models.packing import allow_packing, pack, pad, why_not_packed


@dataclass(frozen=True)
class ReferenceRequest:
    """A prompt and its sampled response, as tokens."""

    prompt_tokens: list[int]
    response_tokens: list[int]


class ReferenceReplica:
    """A frozen causal language model."""

    def __init__(self, batch: ReplicaConfig, path: str, dtype: str, temperature: float) -> None:
        torch.set_num_threads(batch.threads or os.cpu_count() or 1)
        self._device = torch.device("cuda" if batch.num_gpus else "cpu")
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model = model.to(self._device).eval()
        check_supported(self._model)
        self._packed = why_not_packed(self._model) is None
        if self._packed:
            allow_packing(self._model)
        self._temperature = temperature
        self.logprobs.set_max_batch_size(batch.max_batch_size)  # type: ignore[attr-defined]
        self.logprobs.set_batch_wait_timeout_s(batch.batch_wait_s)  # type: ignore[attr-defined]

    @serve.batch
    async def logprobs(self, requests: list[ReferenceRequest]) -> list[list[float]]:
        return await asyncio.to_thread(self._logprobs, requests)

    async def logprobs_together(self, requests: list[ReferenceRequest]) -> list[list[float]]:
        """As one batch, with nothing else in it: the same requests give the same bits."""
        return await asyncio.to_thread(self._logprobs, requests)

    @torch.inference_mode()
    def _logprobs(self, requests: list[ReferenceRequest]) -> list[list[float]]:
        prompts = [request.prompt_tokens for request in requests]
        responses = [request.response_tokens for request in requests]
        batch = pack(prompts, responses, share_prompts=True) if self._packed else pad(prompts, responses)
        tokens_N = torch.tensor([token for response in responses for token in response], device=self._device)
        logprobs_N = response_logprobs(self._model, batch, tokens_N, temperature=self._temperature)
        return [part.tolist() for part in logprobs_N.split(list(batch.lengths))]


class ReferenceModel:
    """Caller's side of the deployment."""

    def __init__(self, handle: DeploymentHandle, *, deadline_s: float, application: str) -> None:
        self._handle = handle
        self._deadline_s = deadline_s
        self.application = application

    async def logprobs(self, prompt_tokens: list[int], response_tokens: list[int]) -> list[float]:
        """One log-probability per response token, at the sampling temperature.

        Raises:
            NoAnswer: no replica answered in time.
        """
        request = ReferenceRequest(prompt_tokens, response_tokens)
        who, asked = "the reference model", "give reference log-probabilities"
        logprobs: list[float] = await ask(
            lambda: self._handle.logprobs.remote(request), who=who, asked=asked, deadline_s=self._deadline_s
        )
        return logprobs

    async def logprobs_together(self, responses: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Of several (prompt, response) pairs, computed as one batch, so that bits repeat.

        Raises:
            NoAnswer: no replica answered in time.
        """
        requests = [ReferenceRequest(*pair) for pair in responses]
        who, asked = "the reference model", f"give reference log-probabilities of {len(requests)} responses"
        logprobs: list[list[float]] = await ask(
            lambda: self._handle.logprobs_together.remote(requests), who=who, asked=asked, deadline_s=self._deadline_s
        )
        return logprobs


async def deploy_reference(
    path: str,
    replicas: ReplicaConfig,
    *,
    application: str,
    dtype: str,
    temperature: float,
    start_s: float,
    score_s: float,
    health_s: float = 10.0,
) -> ReferenceModel:
    """Start the replicas and wait until all are healthy."""
    deployment: Any = serve.deployment(
        ReferenceReplica,
        name="reference",
        num_replicas=replicas.num_replicas,
        ray_actor_options={
            "num_cpus": replicas.num_cpus,
            "num_gpus": replicas.num_gpus,
            "resources": replicas.resources,
        },
        max_ongoing_requests=4 * replicas.max_batch_size,
        **health_checks(health_s),
    )
    app = deployment.bind(replicas, path, dtype, temperature)
    handle = await run_application(app, application, start_s=start_s)
    return ReferenceModel(handle, deadline_s=score_s, application=application)
