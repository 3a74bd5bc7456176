"""Every setting of a run, in one place, with its default: frozen pydantic models, unknown keys refused.

Sections that have outgrown this page are beside it: algorithm.py, workers.py, preferences.py, reward_model.py,
serving.py, watch.py, loop.py, labelling.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from contracts.algorithm import AlgorithmConfig, TrainingConfig
from contracts.labelling import LabellingConfig
from contracts.loop import LoopConfig
from contracts.preferences import PreferencesConfig
from contracts.section import Fraction, FunctionPath, NonNegative, NonNegativeInt, Positive, PositiveInt, Section
from contracts.serving import ServingConfig
from contracts.watch import WatchConfig
from contracts.workers import LearnerConfig, ReplicaConfig, RolloutConfig


class ConfigError(ValueError):
    """The configuration or an input file is wrong: exit status 2, the message is for the person who wrote it."""


class ModelConfig(Section):
    """The policy to start from: a folder, a Hugging Face id, or `bundled:smollm2-135m-instruct`."""

    path: str = Field(min_length=1, description="folder, Hugging Face id or bundled:NAME")
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="what engines and replicas compute in"
    )
    critic_path: str | None = Field(
        default=None, description="what a separate critic starts from, a reward model say; default: path"
    )
    max_context_tokens: PositiveInt = Field(default=1024, description="prompt plus response, in tokens")


class PromptsConfig(Section):
    """Prompt files: JSONL or Parquet rows with `prompt` or `messages`, optional `id`, `domain`, other columns."""

    path: Path
    eval_path: Path | None = Field(
        default=None, description="held-out prompts; default: eval_count rows of path are held out"
    )
    eval_count: NonNegativeInt = Field(default=64, description="how many prompts evaluation uses")
    system: str | None = Field(default=None, description="system message put before every prompt")
    max_prompt_tokens: PositiveInt | None = Field(default=None, description="longer prompts are skipped and counted")


class SamplingConfig(Section):
    """How responses are drawn. top-p and top-k stay off: they renormalise log-probabilities, the learner does not."""

    max_response_tokens: PositiveInt = 256
    temperature: Positive = 1.0


EnsembleRule = Literal["mean", "minimum", "mean_minus_std"]


class RewardConfig(Section):
    """One named component of the reward: a reward model or a Python function."""

    name: str = Field(pattern=r"^[\w-]+$")
    weight: float = 1.0
    model: str | None = Field(
        default=None, description="folder, Hugging Face id, or `preferences`: the one this run trains"
    )
    function: FunctionPath | None = Field(
        default=None, description="module:function(prompts, responses, **columns) -> floats"
    )
    head: str | None = Field(default=None, description="of a reward model with several heads: the one that scores")
    ensemble: EnsembleRule = Field(
        default="mean", description="of a reward model with several members: what they become; NAME/std is kept beside"
    )
    std_weight: NonNegative = Field(default=1.0, description="standard deviations that mean_minus_std takes off")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.function is None):
            raise ValueError("give exactly one of model and function")
        if self.ensemble != "mean" and self.function is not None:
            raise ValueError("ensemble is for the members of a reward model, and this component is a function")
        if self.head is not None and self.function is not None:
            raise ValueError("head names one of a reward model's, and this component is a function")
        return self


class StreamingConfig(Section):
    """How far generation may run ahead of training. 0 is strictly on-policy, in the same loop."""

    max_lag_steps: NonNegativeInt = 0
    queue_samples: PositiveInt | None = Field(default=None, description="default: (max_lag_steps + 1) * batch_size")
    stale_tokens: Literal["expire", "mask"] = Field(
        default="expire",
        description="a response too long for the bound is expired and issued again, or goes on under new weights "
        "while its tokens older than max_lag_steps are left out of the loss",
    )
    queue_bytes: PositiveInt = Field(default=1 << 30, description="bound of the queue in bytes")
    max_bad_fraction: Fraction = Field(
        default=0.25, description="quarantined share of a batch above which the run stops"
    )
    max_attempts: PositiveInt = Field(default=3, description="how often a lease is issued again before the run stops")
    weights: Literal["delta", "dense"] = Field(
        default="delta", description="what engines are sent: what changed, or all weights each time"
    )


class DeadlinesConfig(Section):
    """Every wait across processes ends; these say when."""

    start_s: Positive = Field(default=600.0, description="a worker starts and loads its model")
    place_s: Positive = Field(
        default=60.0, description="Ray has a node for a worker; then what is missing is told, and it waits on"
    )
    lease_s: Positive = Field(default=600.0, description="one response, queueing in the engine included")
    silent_s: Positive = Field(
        default=60.0, description="a rollout worker that is alive, or its engine core, gives no sign of life"
    )
    score_s: Positive = Field(default=180.0, description="one response is scored by one component")
    health_s: Positive = Field(default=10.0, description="a replica answers a health check; after three it is replaced")
    weights_s: Positive = Field(default=180.0, description="one engine takes new weights")
    learn_s: Positive = Field(default=3600.0, description="one step of the learner")
    rank_s: Positive = Field(default=300.0, description="a learner rank answers, and gets through one more micro-batch")
    checkpoint_s: Positive = Field(default=900.0, description="one checkpoint is written")
    stop_s: Positive = Field(default=30.0, description="one worker stops")
    nodes_s: Positive = Field(default=120.0, description="the cluster says which nodes it has")
    disk_s: Positive = Field(default=1800.0, description="somebody makes room on a full disk, for a batch or metrics")


class CheckpointConfig(Section):
    every_steps: PositiveInt = 20
    keep: PositiveInt = Field(default=2, description="older ones are removed")


class EvaluationConfig(Section):
    """Held-out prompts before and after training. Judges are shown, never trained on."""

    judges: tuple[RewardConfig, ...] = ()
    samples_per_prompt: PositiveInt = 1
    shown_samples: NonNegativeInt = Field(default=8, description="responses side by side in report.html")


class RayConfig(Section):
    address: str | None = Field(default=None, description="an existing cluster; default: a local Ray bound to loopback")
    num_cpus: PositiveInt | None = Field(
        default=None, description="CPUs a local Ray offers; default: what the workers ask"
    )
    object_store_gib: Positive = 1.0
    dashboard: bool = True


class WandbConfig(Section):
    """Weights & Biases: `pip install 'headrace[wandb]'`. A resumed run goes on in the same W&B run."""

    project: str = Field(default="headrace", min_length=1)
    entity: str | None = Field(default=None, description="user or team; default: that of the login")
    name: str | None = Field(default=None, description="default: the name of output_dir")
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = Field(default="online", description="offline: sent later with `wandb sync`")


class LoggingConfig(Section):
    """Where curves are shown beside metrics.jsonl, which is always written. docs/metrics.md explains them."""

    tensorboard: bool = True
    wandb: WandbConfig | None = None
    deadline_s: Positive = Field(default=60.0, description="a tracker that does not answer for longer is given up")
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None, description="where a local Ray offers its metrics to Prometheus; default: any free port"
    )


class Config(Section):
    """A whole run."""

    output_dir: Path
    model: ModelConfig
    prompts: PromptsConfig
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    steps: PositiveInt = 100
    resume: bool = False
    deterministic: bool = Field(
        default=False,
        description="the same run gives the same bits, interrupted or not: generation in rounds, which costs time",
    )
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward_workers: ReplicaConfig = ReplicaConfig()
    reference_workers: ReplicaConfig = ReplicaConfig()
    learner: LearnerConfig = LearnerConfig()
    preferences: PreferencesConfig | None = None
    algorithm: AlgorithmConfig = AlgorithmConfig()
    training: TrainingConfig = TrainingConfig()
    streaming: StreamingConfig = StreamingConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ray: RayConfig = RayConfig()
    logging: LoggingConfig = LoggingConfig()
    serving: ServingConfig | None = None
    loop: LoopConfig | None = None
    labelling: LabellingConfig | None = None
    watch: WatchConfig | None = Field(default=None, description="alarms on over-optimisation; {} for the defaults")

    @property
    def served(self) -> ServingConfig | None:
        """The application that training starts itself."""
        return self.serving if self.serving is not None and self.serving.start else None

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for a whole response."""
        room = self.model.max_context_tokens - self.sampling.max_response_tokens
        return min(room, self.prompts.max_prompt_tokens or room)

    @property
    def queue_samples(self) -> int:
        return self.streaming.queue_samples or (self.streaming.max_lag_steps + 1) * self.training.batch_size

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [component.name for component in (*self.rewards, *self.evaluation.judges)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rewards and evaluation.judges: the name {twice[0]!r} is used twice")
        if self.preferences is None and any(component.model == "preferences" for component in self.rewards):
            raise ValueError("rewards: model is `preferences`, but there is no preferences section to train it from")
        if self.preferences is not None:
            heads = tuple(self.preferences.reward_model.heads)
            for component in (*self.rewards, *self.evaluation.judges):
                if component.model == "preferences" and component.head not in (heads if heads[1:] else (None, *heads)):
                    raise ValueError(
                        f"rewards: {component.name} has head {component.head!r}, allowed is one of "
                        f"preferences.reward_model.heads: {', '.join(heads)}"
                    )
        if self.loop is not None:
            if self.preferences is None or self.preferences.paths:
                raise ValueError(
                    "loop: asks anew in every round, so it needs preferences.simulate or preferences.people"
                )
            if not any(component.model == "preferences" for component in self.rewards):
                raise ValueError("loop: no reward has model `preferences`, so nothing would learn from the answers")
            if self.steps < self.loop.rounds:
                raise ValueError(f"loop: {self.loop.rounds} rounds need as many steps at least, not {self.steps}")
            if self.deterministic:
                raise ValueError("loop: when a new reward model comes depends on timing: leave deterministic out")
        if self.model.max_context_tokens <= self.sampling.max_response_tokens:
            raise ValueError(
                f"sampling.max_response_tokens {self.sampling.max_response_tokens} leaves no room for a prompt in "
                f"model.max_context_tokens {self.model.max_context_tokens}"
            )
        if self.training.micro_batch_tokens < self.model.max_context_tokens:
            raise ValueError(
                f"training.micro_batch_tokens {self.training.micro_batch_tokens} is less than one sequence "
                f"(model.max_context_tokens {self.model.max_context_tokens})"
            )
        if self.algorithm.name in ("grpo", "dr_grpo", "rloo") and self.training.samples_per_prompt == 1:
            raise ValueError(
                f"training.samples_per_prompt is 1, but {self.algorithm.name} compares responses to one prompt with "
                "each other: set 2 or more"
            )
        if self.model.critic_path is not None and (self.algorithm.name, self.algorithm.critic) != ("ppo", "separate"):
            raise ValueError("model.critic_path is given, but only algorithm.critic `separate` of ppo loads it")
        if self.deterministic and self.streaming.max_lag_steps > 0:
            raise ValueError(
                f"deterministic: true needs streaming.max_lag_steps 0, not {self.streaming.max_lag_steps}: what is "
                "sampled while weights change depends on when they arrive"
            )
        if self.deterministic and self.rollout.autoscale is not None:
            raise ValueError(
                "deterministic: true needs a fixed number of workers, not rollout.autoscale: prompts go to workers by "
                "their place, and how many there are would depend on timing"
            )
        if self.deterministic and self.model.dtype == "float32" and self.training.lora is None:
            raise ValueError(
                "deterministic: true needs model.dtype bfloat16 (or training.lora): checkpoints hold the policy in "
                "bfloat16, so that engines which start from one would not serve what float32 ones had"
            )
        if self.watch is not None and self.watch.on_alarm == "roll_back":
            slowest = max((alarm.raise_after for alarm in self.watch.alarms.values()), default=1)
            if self.checkpoint.keep < 2 or slowest > self.checkpoint.every_steps:
                raise ValueError(
                    "watch.on_alarm roll_back needs a checkpoint from before the alarm: checkpoint.keep 2 or more, not "
                    f"{self.checkpoint.keep}, and checkpoint.every_steps (now {self.checkpoint.every_steps}) no less "
                    f"than the largest raise_after ({slowest})"
                )
        if self.queue_samples < self.training.batch_size:
            raise ValueError(
                f"streaming.queue_samples {self.queue_samples} is less than training.batch_size "
                f"{self.training.batch_size}: no batch would ever be complete"
            )
        return self


class LabellingRun(Section):
    """All that `headrace label` reads: a file of its own with these sections, or that of a run that has them too."""

    labelling: LabellingConfig
    deadlines: DeadlinesConfig = DeadlinesConfig()
    ray: RayConfig = RayConfig(object_store_gib=0.2, dashboard=False)
    logging: LoggingConfig = LoggingConfig()
