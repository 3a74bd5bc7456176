"""What the processes of a run get: cores, GPUs, and how many of them there are."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from contracts.section import NonNegative, NonNegativeInt, Positive, PositiveInt, Section


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


class EngineConfig(WorkerConfig):
    """What one vLLM engine gets. Its processes, one a GPU, share a machine."""

    tensor_parallel_size: PositiveInt = Field(default=1, description="GPUs that one engine spans, on one machine")

    @model_validator(mode="after")
    def _a_gpu_for_each_process(self) -> Self:
        gpus, processes = self.num_gpus, self.tensor_parallel_size
        if gpus and max(gpus, processes) > 1 and gpus != processes:
            raise ValueError(
                f"num_gpus is {gpus:g} and tensor_parallel_size {processes}: an engine uses as many GPUs as it has "
                "processes, so give both the same number"
            )
        return self


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


class RolloutConfig(EngineConfig):
    """Rollout actors: one vLLM engine each."""

    num_workers: PositiveInt = Field(default=1, description="with autoscale: those that the run begins with")
    autoscale: AutoscaleConfig | None = Field(default=None, description="default: always num_workers")
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
