"""Every setting of a run, in one place, with its default: frozen pydantic models, unknown keys refused.

A configuration is a YAML file plus `key=value` overrides (`training.learning_rate=2e-6`). `load` turns both
into a `Config` or raises `ConfigError` with one line that names the field and what is allowed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from contracts.algorithm import AlgorithmConfig, TrainingConfig
from contracts.section import Fraction, FunctionPath, NonNegative, NonNegativeInt, Positive, PositiveInt, Section
from contracts.serving import ServingConfig


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


class WorkerConfig(Section):
    """What one worker process gets. Fractions of a GPU let several share one."""

    num_cpus: NonNegative = Field(default=1.0, description="Ray CPUs reserved (bookkeeping; threads sets what is used)")
    num_gpus: NonNegative = 0.0
    threads: PositiveInt | None = Field(
        default=None, description="compute threads; default: all cores of the machine, shared by a learner's ranks"
    )
    resources: dict[str, Positive] = Field(
        default_factory=dict, description="of Ray's custom resources, to say on which nodes it may run"
    )


class AutoscaleConfig(Section):
    """Rollout workers come and go with the work: no more than the learner needs, and `max_lag_steps` lets work."""

    min_workers: PositiveInt = 1
    max_workers: PositiveInt
    interval_s: Positive = Field(
        default=60.0, description="between two decisions, at least; each needs max_lag_steps + 1 steps too"
    )
    max_worker_hours: Positive | None = Field(
        default=None,
        description="what the command may spend on rollout workers, summed over them, from their start to their end; "
        "then min_workers go on. Times the hourly price of a machine it is the ceiling of its cost",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than max_workers {self.max_workers}")
        return self


class RolloutConfig(WorkerConfig):
    """Rollout actors: one vLLM engine each."""

    num_workers: PositiveInt = Field(default=1, description="with autoscale: those that the run begins with")
    autoscale: AutoscaleConfig | None = Field(default=None, description="default: always num_workers")
    tensor_parallel_size: PositiveInt = 1
    max_concurrent: PositiveInt = Field(default=64, description="responses that one engine works on at once")
    max_deaths_in_a_row: NonNegativeInt = Field(
        default=3, description="in one worker's place, with no response in between, before the run stops"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_gib: Positive = Field(default=1.0, description="KV cache of an engine on CPU")
    kv_cache_on_update: Literal["recompute", "keep"] = Field(
        default="recompute",
        description="when new weights arrive in the middle of responses: recompute their cached states, or keep the "
        "old ones, which costs nothing and mixes versions within a response",
    )

    @property
    def most_workers(self) -> int:
        """As many as there may ever be."""
        return self.autoscale.max_workers if self.autoscale else self.num_workers

    @property
    def fewest_workers(self) -> int:
        """As many as there always are."""
        return self.autoscale.min_workers if self.autoscale else self.num_workers

    @model_validator(mode="after")
    def _begins_within_the_limits(self) -> Self:
        if not self.fewest_workers <= self.num_workers <= self.most_workers:
            raise ValueError(
                f"num_workers {self.num_workers} is not within autoscale.min_workers {self.fewest_workers} and "
                f"autoscale.max_workers {self.most_workers}"
            )
        return self


class LearnerConfig(WorkerConfig):
    """The learner's ranks: processes that share one model."""

    num_ranks: PositiveInt = 1


class ReplicaConfig(WorkerConfig):
    """Ray Serve replicas that score or give reference log-probabilities."""

    num_replicas: PositiveInt = 1
    max_batch_size: PositiveInt = 16
    batch_wait_s: NonNegative = Field(default=0.05, description="how long a replica waits to fill a batch")


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

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.function is None):
            raise ValueError("give exactly one of model and function")
        return self


class VoterGroup(Section):
    """Simulated voters of one kind."""

    count: PositiveInt
    accuracy: Fraction = Field(description="how often a vote agrees with the gold judge; below 0.5 is hostile")


class SimulatedVotes(Section):
    """A panel of simulated voters, for runs without people. The gold judge stays hidden from the training."""

    gold: FunctionPath
    pairs: PositiveInt = 256
    votes_per_pair: PositiveInt = 5
    voters: dict[str, VoterGroup] = Field(
        default_factory=lambda: {
            "careful": VoterGroup(count=6, accuracy=0.9),
            "careless": VoterGroup(count=2, accuracy=0.6),
            "hostile": VoterGroup(count=2, accuracy=0.15),
        },
        min_length=1,
    )

    @model_validator(mode="after")
    def _enough_voters(self) -> Self:
        voters = sum(group.count for group in self.voters.values())
        if voters < self.votes_per_pair:
            raise ValueError(f"votes_per_pair is {self.votes_per_pair} but the panel has only {voters} voters")
        return self


class RewardModelConfig(Section):
    """Training of a Bradley-Terry reward model on comparisons."""

    base: str | None = Field(default=None, description="default: the policy model")
    learning_rate: Positive = 2e-5
    head_learning_rate: Positive = 1e-3
    epochs: PositiveInt = 1
    batch_size: PositiveInt = Field(default=16, description="comparisons an optimizer step")
    trainable_layers: NonNegativeInt | None = Field(
        default=None, description="train only the last N layers; default: all"
    )
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    max_tokens: PositiveInt = 1024


class PreferencesConfig(Section):
    """Where comparisons come from, and the reward model trained on them."""

    path: Path | None = Field(default=None, description="preference file (prompt, chosen, rejected), Parquet or JSONL")
    simulate: SimulatedVotes | None = None
    reward_model: RewardModelConfig = RewardModelConfig()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.simulate is None):
            raise ValueError("give exactly one of path and simulate")
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
        if self.queue_samples < self.training.batch_size:
            raise ValueError(
                f"streaming.queue_samples {self.queue_samples} is less than training.batch_size "
                f"{self.training.batch_size}: no batch would ever be complete"
            )
        return self


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and validate.

    Raises:
        ConfigError: one line that names the file or field and what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}:{line} not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, this file holds {_kind(data)}")
    for override in overrides:
        _override(data, override)
    return validate(data, source=str(path))


def validate(data: Mapping[str, Any], *, source: str) -> Config:
    """Validate a nested mapping; `source` names it in errors."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error)}") from error


def dump(config: Config) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: write key=value, for example training.learning_rate=1e-6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    if value == text.strip():  # unquoted text: prompts.system='"5"' stays text
        value = _number(value)
    *parents, last = key.split(".")
    node: Any = data
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {name} is {_kind(node)}, not a section")
    node[last] = value


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as text; people mean the number."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    # A misspelt key often leaves the right one missing: name the misspelt one.
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    field = ".".join(str(part) for part in problem["loc"]) or "configuration"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown key{_nearest(problem['loc'])}{more}"
    if problem["type"] == "missing":
        return f"{field}: required, but missing{more}"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{field}: {message}{more}" if problem["loc"] else f"{message}{more}"
    got = _shortened(repr(problem["input"]))
    if problem["type"] == "model_type":
        return f"{field}: a section with keys of its own is expected, got {got}{more}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{field}: {message}, got {got}{more}"


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _nearest(loc: tuple[int | str, ...]) -> str:
    known = _keys_at(loc[:-1])
    matches = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    if matches:
        return f", did you mean {matches[0]}?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    section: Any = Config
    for part in loc:
        if isinstance(part, int) or not _is_section(section) or part not in section.model_fields:
            continue  # an index into a list, or a name the person chose
        section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields) if _is_section(section) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section_of(annotation: Any) -> Any:
    """The Section inside `X | None`, `tuple[X, ...]` or `dict[str, X]`."""
    if _is_section(annotation):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
