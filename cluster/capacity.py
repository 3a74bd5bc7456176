"""What a run asks of the cluster together, and whether the cluster could ever give it."""

from __future__ import annotations

import math
from collections import defaultdict

import ray
from ray._private.state import state as ray_state

from contracts.config import Config, ConfigError
from contracts.serving import ServingConfig


def check_capacity(config: Config, *, served: ServingConfig | None = None) -> None:
    """Refuse a run that would wait for ever: it asks for more than the nodes have and an autoscaler may add.

    `served`: the application that the run starts too.

    Raises:
        ConfigError: names what, how much of it, and which settings to lower.
    """
    there, engines = capacity(), ", serving.replicas" if served else ""
    for name, asked in resources_asked(config, served=served).items():
        has = there.get(name, 0.0)
        if asked > has:
            what = f"{name}s" if name in ("CPU", "GPU") else f"of resource {name}"
            settings = f"num_{name.lower()}s" if name in ("CPU", "GPU") else "resources"
            raise ConfigError(
                f"rollout, reward_workers, reference_workers{engines} and learner ask for {asked:g} {what} together, "
                f"the cluster has {has:g} at most; lower {settings} or num_workers, or start nodes with more of it"
            )


def capacity() -> dict[str, float]:
    """The most that the cluster can have of each resource: what its nodes have, or what its autoscaler may start."""
    found = defaultdict(float, ray.cluster_resources())
    for name, most in (ray_state.get_max_resources_from_cluster_config() or {}).items():
        found[name] = max(found[name], float(most))
    return dict(found)


def resources_asked(
    config: Config, *, rollout_workers: int | None = None, served: ServingConfig | None = None
) -> dict[str, float]:
    """What all workers of a run reserve together, by Ray's name of it: CPU, GPU and custom resources.

    `rollout_workers`: another number of them than the run begins with. `served`: the application that it starts too,
    which has engines and replicas for the rewards of its own.
    """
    rollout_workers = rollout_workers or config.rollout.num_workers
    components = (*config.rewards, *config.evaluation.judges)
    models = sum(component.model is not None for component in components)
    reward_replicas = config.reward_workers.num_replicas
    asked: dict[str, float] = defaultdict(float)
    engines = served.most_engines if served else 0
    scorers, scorers_on_gpu = len(config.rewards), sum(component.model is not None for component in config.rewards)
    for workers, count, with_gpus in (
        (config.rollout, rollout_workers, rollout_workers),
        (config.reward_workers, len(components) * reward_replicas, models * reward_replicas),
        (config.reference_workers, config.reference_workers.num_replicas, config.reference_workers.num_replicas),
        (config.learner, config.learner.num_ranks, config.learner.num_ranks),
        *(
            [
                (served.replicas, engines, engines),
                (config.reward_workers, scorers * reward_replicas, scorers_on_gpu * reward_replicas),
            ]
            if served
            else []
        ),
    ):
        for name, amount in {"CPU": workers.num_cpus, **workers.resources}.items():
            asked[name] += count * amount
        asked["GPU"] += with_gpus * workers.num_gpus
    return {name: amount for name, amount in asked.items() if amount}


def local_cpus(config: Config, *, served: ServingConfig | None = None) -> int:
    """Ray CPUs that a local Ray offers: what the workers reserve, and one for the reward model's training.

    Threads share the cores, whatever their number.
    """
    asked = resources_asked(config, rollout_workers=config.rollout.most_workers, served=served)
    return max(2, math.ceil(asked.get("CPU", 0.0) + 1))
