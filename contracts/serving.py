"""Settings of `headrace serve`: the policy behind an API, which weights it follows, and who may ask how much."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from contracts.section import FunctionPath, NonNegative, NonNegativeInt, Positive, PositiveInt, Section
from contracts.workers import EngineConfig

_RUNNING_ON_GPU, _RUNNING_ON_CPU, _RUNNING_A_THREAD = 256, 128, 16
_SHARE_AIMED_AT = 0.7  # of the places of a replica, as Knative's autoscaler aims at: the rest is for the next ones
_FOLLOW = re.compile(r"latest|pinned:\d+|every:[1-9]\d*")


def suited_running(num_gpus: float, threads: int | None) -> int:
    """As many requests as an engine gains from.

    vLLM's own server takes 256 on GPUs of less than 70 GiB (1024 on larger ones) and 128 on CPU; where their cached
    states find no room, it lets the rest wait by itself. A few cores gain little from more long before that: two gave
    327 tokens/s with 16 streams, 456 with 32, and 488 with 64, where each answer takes nearly twice as long
    (docs/results/serving.md).
    """
    if num_gpus:
        return _RUNNING_ON_GPU
    return min(_RUNNING_A_THREAD * (threads or len(os.sched_getaffinity(0))), _RUNNING_ON_CPU)


class EngineReplicaConfig(EngineConfig):
    """The serving replicas: one vLLM engine each. Ray Serve adds and removes them between the two bounds."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    max_running: PositiveInt = Field(
        default_factory=lambda given: suited_running(given["num_gpus"], given["threads"]),
        description="requests that one engine works on at once; default: 256 on a GPU, else 16 a compute thread, at "
        "most 128",
    )
    target_running: Positive = Field(
        default_factory=lambda given: round(_SHARE_AIMED_AT * given["max_running"], 1),
        description="requests, running and waiting, a replica that Serve scales for; default: 0.7 max_running",
    )
    upscale_delay_s: NonNegative = Field(default=10.0, description="more replicas were wanted for so long")
    downscale_delay_s: NonNegative = Field(default=300.0, description="fewer replicas were enough for so long")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_gib: Positive = Field(default=1.0, description="KV cache of an engine on CPU")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, must be at least min_replicas ({self.min_replicas})"
            )
        if self.scales and self.target_running > self.max_running:
            raise ValueError(
                f"target_running is {self.target_running:g}, must be at most max_running ({self.max_running}): a "
                "replica runs no more than that, so one would be added only for those who wait, if at all"
            )
        return self

    @property
    def scales(self) -> bool:
        """Ray Serve decides how many there are."""
        return self.min_replicas < self.max_replicas


class GateConfig(Section):
    """A version is promoted only if it is no worse than the current one on a fixed set of prompts."""

    prompts: Path = Field(description="prompt file, JSONL or Parquet, as in prompts.path")
    num_prompts: PositiveInt = 32
    max_response_tokens: PositiveInt = 64
    max_reward_drop: NonNegative = Field(default=0.1, description="mean reward may fall by so much")
    max_kl: Positive = Field(default=10.0, description="nats a response, current version to candidate")
    max_length_ratio: Annotated[float, Field(gt=1)] = Field(
        default=2.0, description="mean response length, candidate to current, either way"
    )


class ServingLimits(Section):
    """What one caller may ask for; over a rate the answer is 429, over the queue 503, each with Retry-After."""

    max_waiting: NonNegativeInt = Field(
        default=64, description="requests that wait for a free place, over all replicas"
    )
    requests_per_minute: PositiveInt | None = Field(default=None, description="a key; default: no limit")
    tokens_per_minute: PositiveInt | None = Field(default=None, description="prompt and response, a key")
    max_body_bytes: PositiveInt = 1 << 20
    max_response_tokens: PositiveInt = Field(default=1024, description="the largest max_tokens, and its default")
    max_choices: PositiveInt = Field(default=16, description="the largest n")


class ServingConfig(Section):
    """The policy behind an OpenAI-compatible API on Ray Serve."""

    start: bool = Field(
        default=False, description="`headrace train` starts the application itself; it goes on when training has ended"
    )
    model: str | None = Field(
        default=None, description="policy folder or checkpoint to begin with; default: newest checkpoint of output_dir"
    )
    name: str = Field(default="policy", pattern=r"^[\w.-]+$", description="the model's name in the API")
    host: str = Field(default="127.0.0.1", description="any other than loopback needs keys")
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    follow: str = Field(
        default="latest", description="latest, pinned:VERSION, or every:N (each N-th published version)"
    )
    pinned: tuple[NonNegativeInt, ...] = Field(
        default=(), description="versions with a replica of their own, asked for as NAME@VERSION"
    )
    allow_mixed: bool = Field(
        default=False, description="take new weights in the middle of answers instead of letting them finish first"
    )
    replicas: EngineReplicaConfig = EngineReplicaConfig()
    limits: ServingLimits = ServingLimits()
    gate: GateConfig | None = None
    keep_versions: PositiveInt = Field(default=50, description="versions whose weights stay on disk, pinned ones apart")
    keyframe_every: PositiveInt = Field(default=50, description="versions; how long a chain of deltas may become")
    keys: Path | None = Field(default=None, description="file of hashed API keys; also HEADRACE_API_KEYS")
    request_s: Positive = Field(default=120.0, description="one answer, waiting included")
    drain_s: Positive = Field(default=150.0, description="answers finish before new weights; longer ones are ended")
    first_token_retries: NonNegativeInt = Field(default=3, description="after replicas that died before a token")
    log_prompts: bool = False
    redact: FunctionPath | None = Field(default=None, description="`module:function` that a logged text goes through")
    feedback: str | None = Field(default=None, description="file or URL; default: output_dir/serving/feedback.sqlite")
    answers_kept: PositiveInt = Field(default=10_000, description="newest answers that feedback can be given on")

    @property
    def most_engines(self) -> int:
        """As many as there may ever be: replicas, pinned versions, the gate's."""
        return self.replicas.max_replicas + len(self.pinned) + (self.gate is not None)

    @property
    def application(self) -> str:
        """The name of the Ray Serve application, by which training finds it."""
        return f"headrace-serving-{self.name}"

    @field_validator("follow")
    @classmethod
    def _known(cls, value: str) -> str:
        if not _FOLLOW.fullmatch(value):
            raise ValueError(f"{value!r} is not latest, pinned:VERSION or every:N")
        return value

    @model_validator(mode="after")
    def _can_grow(self) -> Self:
        replicas = self.replicas
        if replicas.scales and not self.limits.max_waiting and replicas.target_running >= replicas.max_running:
            raise ValueError(
                f"replicas.target_running is {replicas.target_running:g}, must be below replicas.max_running "
                f"({replicas.max_running}) where limits.max_waiting is 0: more than that are refused and not counted, "
                "so no replica would be added"
            )
        return self
