"""Reward components as Ray Serve deployments, and the weighted sum over them.

A replica consumes single (dialogue, response) pairs, batches what arrives together, and answers each by itself.
Batching, replicas, health checks and failover are Serve's. Replicas hold no state but the reward model that they score
with, and each request says which that must be at least: a call is safe to repeat.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from actors.applications import run_application
from actors.ensemble import ensemble_rewards
from actors.replicas import ask, health_checks
from contracts.config import RewardConfig
from contracts.events import first_line
from contracts.records import Prompt
from contracts.waiting import NoAnswer
from contracts.workers import ReplicaConfig
from models.reward import RewardModel


@dataclass(frozen=True)
class ModelSource:
    """The folder of a reward model, and how many times the component had changed to another when it came."""

    path: str
    number: int = 0


@dataclass(frozen=True)
class ScoreRequest:
    """A prompt (its own messages, user text, extra columns) and one response to it.

    `source` is the oldest reward model that may score it: a replica that has just started loads it first.
    """

    messages: list[dict[str, str]]
    prompt: str
    response: str
    columns: dict[str, Any]
    source: ModelSource | None = None


@dataclass(frozen=True)
class Score:
    """One component's score, or the reason why there is none; `std` is that of an ensemble's members, `latent` how far
    the response lies from what the reward model was trained on, where it knows that."""

    value: float
    error: str
    version: str
    replica: str
    std: float | None = None
    latent: float | None = None


class BadSample(ValueError):
    """A trajectory that cannot be scored; the message is the reason it is quarantined with."""


@dataclass(frozen=True)
class Found:
    """What a replica makes of a batch: a score or the reason why there is none for each, the version that gave them,
    the members' standard deviations where an ensemble did, and distances from the training data where they are known.
    """

    values: Sequence[float | str]
    version: str
    stds: Sequence[float] | None = None
    latents: Sequence[float] | None = None


class _Replica:
    """What both kinds of replica share: dynamic batching off the event loop, so that health checks are answered."""

    def __init__(self, batch: ReplicaConfig) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        self.score.set_max_batch_size(batch.max_batch_size)  # type: ignore[attr-defined]
        self.score.set_batch_wait_timeout_s(batch.batch_wait_s)  # type: ignore[attr-defined]

    @serve.batch
    async def score(self, requests: list[ScoreRequest]) -> list[Score]:
        return await self._scored(requests)

    async def score_together(self, requests: list[ScoreRequest]) -> list[Score]:
        """As one batch, with nothing else in it: the same requests give the same bits."""
        return await self._scored(requests)

    async def _scored(self, requests: list[ScoreRequest]) -> list[Score]:
        found = await asyncio.to_thread(self._scores, requests)
        unknown = [None] * len(found.values)
        stds: Sequence[float | None] = unknown if found.stds is None else found.stds
        latents: Sequence[float | None] = unknown if found.latents is None else found.latents
        each = zip(found.values, stds, latents, strict=True)
        return [self._reply(value, found.version, std, latent) for value, std, latent in each]

    def _scores(self, requests: list[ScoreRequest]) -> Found:
        raise NotImplementedError

    def _reply(self, value: float | str, version: str, std: float | None, latent: float | None) -> Score:
        if isinstance(value, str):
            return Score(math.nan, value, version, self._name)
        error = "" if math.isfinite(value) else f"the score is {value}"
        return Score(value, error, version, self._name, std, latent)


class ModelReplica(_Replica):
    """A learned reward model, which `load` replaces by another while it goes on scoring.

    Requests wait for nothing but their own batch. One that asks for a newer reward model than this replica has (it
    took the place of one that died) waits until it is loaded; the caller's deadline ends that.
    """

    def __init__(
        self, batch: ReplicaConfig, source: ModelSource, dtype: str, max_tokens: int, component: RewardConfig
    ) -> None:
        super().__init__(batch)
        torch.set_num_threads(batch.threads or os.cpu_count() or 1)
        device = "cuda" if batch.num_gpus else "cpu"
        self._options: dict[str, Any] = {"dtype": dtype, "device": device, "max_tokens": max_tokens}
        self._options["head"] = component.head
        self._rule: dict[str, Any] = {"rule": component.ensemble, "std_weight": component.std_weight}
        self._loading = threading.Lock()
        self._loaded = source, RewardModel.load(source.path, **self._options)

    async def load(self, source: ModelSource) -> str:
        """Score with this reward model from now on, unless a newer one is loaded; the version that scores then.

        Raises:
            ValueError: it cannot be loaded; the old one goes on.
        """
        return await asyncio.to_thread(self._load, source)

    def _load(self, source: ModelSource) -> str:
        with self._loading:
            if source.number > self._loaded[0].number:
                self._loaded = source, RewardModel.load(source.path, **self._options)
            return self._loaded[1].version

    def _scores(self, requests: list[ScoreRequest]) -> Found:
        newest = max((r.source for r in requests if r.source is not None), key=lambda s: s.number, default=None)
        if newest is not None and newest.number > self._loaded[0].number:
            self._load(newest)
        model = self._loaded[1]  # as it is now: another may take its place while this one scores
        dialogues = [[*request.messages, {"role": "assistant", "content": request.response}] for request in requests]
        scores = model.scores(dialogues)
        values = ensemble_rewards(scores.members, scores.std, **self._rule)
        return Found(values, model.version, scores.std if model.num_members > 1 else None, scores.latent)


class FunctionReplica(_Replica):
    """A Python function `module:function(prompts, responses, **columns) -> list of floats`."""

    def __init__(self, batch: ReplicaConfig, path: str) -> None:
        super().__init__(batch)
        self._function = load_function(path)
        self._path = path

    def _scores(self, requests: list[ScoreRequest]) -> Found:
        return Found(self._values(requests), self._path)

    def _values(self, requests: list[ScoreRequest]) -> Sequence[float | str]:
        try:
            return call_function(self._function, requests)
        # A reward function is the user's: whatever it raises is the reason for quarantine, one sample at a time.
        except Exception as error:  # noqa: BLE001
            if len(requests) == 1:
                return [f"{type(error).__name__}: {error}"]
            return [value for request in requests for value in self._values([request])]


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


class NotLoaded(ValueError):
    """A reward model that replicas would not take; they score with the one before."""


@dataclass
class RewardHandle:
    """One deployed component. `source` is the reward model that it scores with, None for a function."""

    config: RewardConfig
    handle: DeploymentHandle
    application: str
    source: ModelSource | None = None

    @property
    def who(self) -> str:
        return f"reward component {self.config.name}"

    async def score(self, request: ScoreRequest, *, deadline_s: float) -> Score:
        """One score. A request whose replica died is sent again: replicas hold no state but their reward model."""
        request = replace(request, source=self.source)
        asked = "score a response"
        score: Score = await ask(
            lambda: self.handle.score.remote(request), who=self.who, asked=asked, deadline_s=deadline_s
        )
        return score

    async def score_together(self, requests: list[ScoreRequest], *, deadline_s: float) -> list[Score]:
        """The scores of one batch, which no other response shares. Sent again where its replica died."""
        requests = [replace(request, source=self.source) for request in requests]
        asked = f"score {len(requests)} responses"
        scores: list[Score] = await ask(
            lambda: self.handle.score_together.remote(requests), who=self.who, asked=asked, deadline_s=deadline_s
        )
        return scores

    async def load(self, path: str, *, deadline_s: float) -> tuple[str, str]:
        """Let every replica score with the reward model in `path`; the reward_version before and after.

        Replicas go on with the old one until they have loaded it, so that no response waits; for that time scores of
        both versions come, each with its own. What is scored after this returns has the new one, also by a replica
        that starts later.

        Raises:
            NotLoaded: a replica cannot load it, or did not within the deadline: all are back at the one before.
            ValueError: the component is a function.
        """
        if self.source is None:
            raise ValueError(f"{self.who} is the function {self.config.function}: no reward model can take its place")
        before, number = self.source, self.source.number
        old = await self._told(before, deadline_s)
        try:
            new = await self._told(ModelSource(path, number + 1), deadline_s)
        except (RayTaskError, ValueError, NoAnswer) as error:
            self.source = ModelSource(before.path, number + 2)
            await self._told(self.source, deadline_s)
            raise NotLoaded(first_line(error.cause if isinstance(error, RayTaskError) else error)) from error
        self.source = ModelSource(path, number + 1)
        return old, new

    async def _told(self, source: ModelSource, deadline_s: float) -> str:
        versions: list[str] = await ask(
            lambda: self.handle.broadcast("load", source).results_async(),
            who=self.who,
            asked=f"load {source.path}",
            deadline_s=deadline_s,
        )
        if len(set(versions)) != 1:
            found = ", ".join(sorted(set(versions))) or "none"
            raise ValueError(f"{source.path}: replicas find different reward models there: {found}")
        return versions[0]


# The sum, components by name (NAME/std: of an ensemble, NAME/latent: distance from the training data), versions.
Reward = tuple[float, dict[str, float], str]


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
        for handle, score in zip(self._handles, scores, strict=True):
            if score.std is not None:
                components[f"{handle.config.name}/std"] = score.std
            if score.latent is not None:
                components[f"{handle.config.name}/latent"] = score.latent
        return total, components, "+".join(score.version for score in scores)


def _request(prompt: Prompt, response: str) -> ScoreRequest:
    return ScoreRequest([dict(message) for message in prompt.messages], prompt.text, response, prompt.columns)


def reward_application(
    component: RewardConfig,
    replicas: ReplicaConfig,
    *,
    model_path: str | None,
    dtype: str,
    max_tokens: int,
    health_s: float = 10.0,
) -> tuple[serve.Application, ModelSource | None]:
    """A component's application, and the reward model that it begins with, which a function has not."""
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
        return deployment.bind(replicas, component.function), None
    source = ModelSource(str(model_path))
    deployment = serve.deployment(ModelReplica, name="reward", **options)
    return deployment.bind(replicas, source, dtype, max_tokens, component), source


async def deploy_reward(
    component: RewardConfig, replicas: ReplicaConfig, *, application: str, start_s: float, **options: Any
) -> RewardHandle:
    """Start a component's replicas (`reward_application` takes the options) and wait until all are healthy."""
    app, source = reward_application(component, replicas, **options)
    return RewardHandle(component, await run_application(app, application, start_s=start_s), application, source)
