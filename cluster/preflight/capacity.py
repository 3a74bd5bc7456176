"""Whether a local run fits this machine: GPUs, memory and disk, estimated before a model loads.

The estimates are low on purpose: a run is refused only where it clearly cannot work.
"""

from __future__ import annotations

from cluster.doctor.machine import GIB, available_memory_gib, free_disk_gib, visible_gpus
from contracts.config import Config, ConfigError

# Bytes a parameter: fp32 master, two Adam moments and fp32 gradients; a bf16 copy; what a checkpoint holds.
LEARNER_BYTES, BF16_BYTES, CHECKPOINT_BYTES = 16, 2, 14
# With LoRA the model is loaded in fp32 and then kept in what it computes in; what belongs to adapters is small.
LORA_LEARNER_BYTES, LORA_CHECKPOINT_BYTES = 4, 2
# Python, torch and transformers or vLLM in one process, and for the learner some activations.
LEARNER_PROCESS_GIB, ENGINE_PROCESS_GIB, REPLICA_PROCESS_GIB = 1.5, 1.5, 0.7


def check_gpus(config: Config) -> None:
    """Raises ConfigError if the run asks for more GPUs than there are."""
    models = sum(component.model is not None for component in config.rewards)
    asked = {
        "rollout": config.rollout.most_workers * config.rollout.num_gpus,
        "reward_workers": models * config.reward_workers.num_replicas * config.reward_workers.num_gpus,
        "reference_workers": config.reference_workers.num_replicas * config.reference_workers.num_gpus,
        "learner": config.learner.num_ranks * config.learner.num_gpus,
    }
    if config.served is not None:  # it has replicas for the rewards of its own
        asked["serving"] = config.served.most_engines * config.served.replicas.num_gpus + asked["reward_workers"]
    total, present = sum(asked.values()), visible_gpus()
    if total > present + 1e-6:  # shares like 0.1 do not add up exactly
        parts = ", ".join(f"{name} {count:g}" for name, count in asked.items() if count)
        raise ConfigError(
            f"num_gpus: the run asks for {total:g} GPUs ({parts}), this machine has {present}; "
            "lower num_gpus or the number of workers, or give ray.address of a cluster"
        )


def check_memory(config: Config, *, policy: int | None, reward_models: list[int | None]) -> None:
    """Raises ConfigError if the processes cannot fit. Sizes are in parameters; None is unknown and counts as 0."""
    need = memory_gib(config, policy=policy or 0, reward_models=[size or 0 for size in reward_models])
    available = available_memory_gib()
    if need > available:
        raise ConfigError(
            f"memory: the run needs about {need:.1f} GiB, {available:.1f} GiB are available; take a smaller model.path "
            "or lower rollout.num_workers, rollout.kv_cache_gib, num_replicas or serving.replicas"
        )


def memory_gib(config: Config, *, policy: int, reward_models: list[int]) -> float:
    """Host memory of a local run, at least. A worker with a GPU keeps its weights there."""

    def weights(worker_gpus: float, parameters: int, bytes_each: int) -> float:
        return 0.0 if worker_gpus else parameters * bytes_each / GIB

    rollout, rewards, reference = config.rollout, config.reward_workers, config.reference_workers
    engine = weights(rollout.num_gpus, policy, BF16_BYTES) + ENGINE_PROCESS_GIB
    if not rollout.num_gpus:
        engine += rollout.kv_cache_gib
    scorers = sum(weights(rewards.num_gpus, size, BF16_BYTES) + REPLICA_PROCESS_GIB for size in reward_models)
    served, serving = config.served, 0.0
    if served is not None:
        cache_gib = 0.0 if served.replicas.num_gpus else served.replicas.kv_cache_gib
        each = weights(served.replicas.num_gpus, policy, BF16_BYTES) + ENGINE_PROCESS_GIB + cache_gib
        serving = served.most_engines * each + rewards.num_replicas * scorers
    return (
        weights(config.learner.num_gpus, policy, LORA_LEARNER_BYTES if config.training.lora else LEARNER_BYTES)
        + config.learner.num_ranks * LEARNER_PROCESS_GIB
        + rollout.most_workers * engine
        + rewards.num_replicas * scorers
        + reference.num_replicas * (weights(reference.num_gpus, policy, BF16_BYTES) + REPLICA_PROCESS_GIB)
        + serving
    )


def check_disk(config: Config, *, policy: int | None, checkpoints: int) -> None:
    """Raises ConfigError if the checkpoints cannot fit. One more than is kept exists while a new one is written."""
    missing = max(1, config.checkpoint.keep + 1 - checkpoints)
    bytes_each = LORA_CHECKPOINT_BYTES if config.training.lora else CHECKPOINT_BYTES
    need = missing * bytes_each * (policy or 0) / GIB
    free = free_disk_gib(config.output_dir)
    if need > free:
        raise ConfigError(
            f"output_dir {config.output_dir}: checkpoints need about {need:.1f} GiB more "
            f"(checkpoint.keep {config.checkpoint.keep}), its disk has {free:.1f} GiB free; "
            "lower checkpoint.keep or choose another disk"
        )
