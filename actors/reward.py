"""Reward components as Ray Serve deployments, and the weighted sum over them.

A replica consumes single (dialogue, response) pairs, batches what arrives together, and answers each by itself.
Batching, replicas, health checks and failover are Serve's. Replicas hold no state: a call is safe to repeat.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.applications import run_application
from actors.replicas import ask, health_checks
from contracts.config import RewardConfig
from contracts.records import Prompt
from contracts.workers import ReplicaConfig
from models.reward import RewardModel


@dataclass(frozen=True)
class ScoreRequest:
    """A prompt (its own messages, user text, extra columns) and one response to it."""

    messages: list[dict[str, str]]
    prompt: str
    response: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One component's score, or the reason why there is none."""

    value: float
    error: str
    version: str
    replica: str


class BadSample(ValueError):
    """A trajectory that cannot be scored; the message is the reason it is quarantined with."""


class _Replica:
    """What both kinds of replica share: dynamic batching off the event loop, so that health checks are answered."""

    version = ""

    def __init__(self, batch: ReplicaConfig) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        self.score.set_max_batch_size(batch.max_batch_size)  # type: ignore[attr-defined]
        self.score.set_batch_wait_timeout_s(batch.batch_wait_s)  # type: ignore[attr-defined]

    @serve.batch
    async def score(self, requests: list[ScoreRequest]) -> list[Score]:
        values = await asyncio.to_thread(self._scores, requests)
        return [self._reply(value) for value in values]

    async def score_together(self, requests: list[ScoreRequest]) -> list[Score]:
        """As one batch, with nothing else in it: the same requests give the same bits."""
        values = await asyncio.to_thread(self._scores, requests)
        return [self._reply(value) for value in values]

    def _scores(self, requests: list[ScoreRequest]) -> Sequence[float | str]:
        raise NotImplementedError

    def _reply(self, value: float | str) -> Score:
        if isinstance(value, str):
            return Score(math.nan, value, self.version, self._name)
        error = "" if math.isfinite(value) else f"the score is {value}"
        return Score(value, error, self.version, self._name)


class ModelReplica(_Replica):
    """A learned reward model."""

    def __init__(self, batch: ReplicaConfig, path: str, dtype: str, max_tokens: int) -> None:
        super().__init__(batch)
        torch.set_num_threads(batch.threads or os.cpu_count() or 1)
        device = "cuda" if batch.num_gpus else "cpu"
        self._model = RewardModel.load(path, dtype=dtype, device=device, max_tokens=max_tokens)
        self.version = self._model.version

    def _scores(self, requests: list[ScoreRequest]) -> Sequence[float]:
        dialogues = [[*request.messages, {"role": "assistant", "content": request.response}] for request in requests]
        return self._model.score(dialogues)


class FunctionReplica(_Replica):
    """A Python function `module:function(prompts, responses, **columns) -> list of floats`."""

    def __init__(self, batch: ReplicaConfig, path: str) -> None:
        super().__init__(batch)
        self._function = load_function(path)
        self.version = path

    def _scores(self, requests: list[ScoreRequest]) -> Sequence[float | str]:
        try:
            return call_function(self._function, requests)
        # A reward function is the user's: whatever it raises is the reason for quarantine, one sample at a time.
        except Exception as error:  # noqa: BLE001
            if len(requests) == 1:
                return [f"{type(error).__name__}: {error}"]
            return [value for request in requests for value in self._scores([request])]


def load_function(path: str) -> Callable[..., Sequence[float]]:
    """The function that `module:function` names."""
    module, _, name = path.partition(":")
    function: Callable[..., Sequence[float]] = getattr(importlib.import_module(module), name)
    return function


def call_function(function: Callable[..., Sequence[float]], requests: Sequence[ScoreRequest]) -> list[float]:
    """Call a reward function with the columns that it asks for by name (all, if it takes **columns).

    Raises:
        ValueError: it returned another number of scores than there were responses.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    offered = {name for request in requests for name in request.columns}
    wanted = offered if takes_all else offered & set(parameters)
    columns = {name: [request.columns.get(name) for request in requests] for name in sorted(wanted)}
    prompts = [request.prompt for request in requests]
    scores = list(function(prompts, [request.response for request in requests], **columns))
    if len(scores) != len(requests):
        raise ValueError(f"returned {len(scores)} scores for {len(requests)} responses")
    return [float(score) for score in scores]


@dataclass(frozen=True)
class RewardHandle:
    """One deployed component."""

    config: RewardConfig
    handle: DeploymentHandle
    application: str

    async def score(self, request: ScoreRequest, *, deadline_s: float) -> Score:
        """One score. A request whose replica died is sent again: replicas hold no state."""
        who, asked = f"reward component {self.config.name}", "score a response"
        score: Score = await ask(lambda: self.handle.score.remote(request), who=who, asked=asked, deadline_s=deadline_s)
        return score

    async def score_together(self, requests: list[ScoreRequest], *, deadline_s: float) -> list[Score]:
        """The scores of one batch, which no other response shares. Sent again where its replica died."""
        who, asked = f"reward component {self.config.name}", f"score {len(requests)} responses"
        scores: list[Score] = await ask(
            lambda: self.handle.score_together.remote(requests), who=who, asked=asked, deadline_s=deadline_s
        )
        return scores


Reward = tuple[float, dict[str, float], str]  # the sum, each component's score by name, the versions that gave them


class RewardComponents:
    """All components of a reward: asked at the same time, summed by weight, each score kept."""

    def __init__(self, handles: Sequence[RewardHandle], *, deadline_s: float) -> None:
        self._handles = tuple(handles)
        self._deadline_s = deadline_s

    @property
    def handles(self) -> tuple[RewardHandle, ...]:
        return self._handles

    async def score(self, prompt: Prompt, response: str) -> Reward:
        """The weighted sum, each component's score by name, and the versions that gave them.

        Raises:
            BadSample: a component raised or gave a score that is not finite.
            NoAnswer: a component did not answer in time.
        """
        request = _request(prompt, response)
        scores = await asyncio.gather(*(handle.score(request, deadline_s=self._deadline_s) for handle in self._handles))
        return self._summed(scores)

    async def score_together(self, asked: Sequence[tuple[Prompt, str]]) -> list[Reward | BadSample]:
        """What `score` gives for each, or raises: computed as one batch by each component, so that bits repeat.

        Raises:
            NoAnswer: a component did not answer in time.
        """
        requests = [_request(prompt, response) for prompt, response in asked]
        by_component = await asyncio.gather(
            *(handle.score_together(requests, deadline_s=self._deadline_s) for handle in self._handles)
        )
        rewards: list[Reward | BadSample] = []
        for index in range(len(requests)):
            try:
                rewards.append(self._summed([scores[index] for scores in by_component]))
            except BadSample as bad:
                rewards.append(bad)
        return rewards

    def _summed(self, scores: Sequence[Score]) -> Reward:
        for handle, score in zip(self._handles, scores, strict=True):
            if score.error:
                raise BadSample(f"reward component {handle.config.name}: {score.error}")
        components = {handle.config.name: score.value for handle, score in zip(self._handles, scores, strict=True)}
        total = sum(handle.config.weight * components[handle.config.name] for handle in self._handles)
        return total, components, "+".join(score.version for score in scores)


def _request(prompt: Prompt, response: str) -> ScoreRequest:
    return ScoreRequest([dict(message) for message in prompt.messages], prompt.text, response, prompt.columns)


async def deploy_reward(
    component: RewardConfig,
    replicas: ReplicaConfig,
    *,
    application: str,
    model_path: str | None,
    dtype: str,
    max_tokens: int,
    start_s: float,
    health_s: float = 10.0,
) -> RewardHandle:
    """Start a component's replicas and wait until all are healthy."""
    options: dict[str, Any] = {
        "num_replicas": replicas.num_replicas,
        "ray_actor_options": {
            "num_cpus": replicas.num_cpus,
            "num_gpus": replicas.num_gpus,
            "resources": replicas.resources,
        },
        "max_ongoing_requests": 4 * replicas.max_batch_size,
        **health_checks(health_s),
    }
    if component.function is not None:
        options["ray_actor_options"]["num_gpus"] = 0
        deployment: Any = serve.deployment(FunctionReplica, name="reward", **options)
        app = deployment.bind(replicas, component.function)
    else:
        deployment = serve.deployment(ModelReplica, name="reward", **options)
        app = deployment.bind(replicas, model_path, dtype, max_tokens)
    return RewardHandle(component, await run_application(app, application, start_s=start_s), application)
