"""What a run asks of the cluster together, and whether the cluster could ever give it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ray
from ray._private.state import state as ray_state

from actors.placement import largest, look
from contracts.config import Config, ConfigError, RewardConfig
from contracts.serving import ServingConfig
from contracts.workers import WorkerConfig


def check_capacity(config: Config, *, served: ServingConfig | None = None) -> None:
    """Refuse a run that would wait for ever: it asks for more than the nodes have and an autoscaler may add, together
    or for one worker, which lives on one node.

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
    cluster = look()
    for kind in _kinds(config, served=served):
        if not cluster.could_hold(kind.each):
            asks = " and ".join(f"{amount:g} {name}" for name, amount in sorted(kind.each.items()))
            raise ConfigError(
                f"{kind.section}: one worker asks for {asks}, and that has to be on one node; no node is that large or "
                f"could be started: {largest(kind.each, cluster)} at most; lower what one worker asks for, or "
                "start larger nodes"
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
    asked: dict[str, float] = defaultdict(float)
    for kind in _kinds(config, rollout_workers=rollout_workers, served=served):
        for name, amount in kind.each.items():
            asked[name] += kind.number * amount
    return dict(asked)


class _Kind(NamedTuple):
    """Workers that ask for the same, and the section of the configuration that says so."""

    section: str
    number: int
    each: dict[str, float]  # by Ray's names, without what is 0


def _kinds(
    config: Config, *, rollout_workers: int | None = None, served: ServingConfig | None = None
) -> Iterator[_Kind]:
    """A replica that scores with a function gets no GPU."""

    def kind(section: str, count: int, worker: WorkerConfig, *, gpus: bool = True) -> _Kind:
        each = {"CPU": worker.num_cpus, "GPU": worker.num_gpus if gpus else 0.0, **worker.resources}
        return _Kind(section, count, {name: amount for name, amount in each.items() if amount})

    def scorers(components: Sequence[RewardConfig]) -> Iterator[_Kind]:
        replicas, models = config.reward_workers.num_replicas, sum(each.model is not None for each in components)
        for count, gpus in ((models, True), (len(components) - models, False)):
            if count:
                yield kind("reward_workers", count * replicas, config.reward_workers, gpus=gpus)

    yield kind("rollout", rollout_workers or config.rollout.num_workers, config.rollout)
    yield from scorers((*config.rewards, *config.evaluation.judges))
    yield kind("reference_workers", config.reference_workers.num_replicas, config.reference_workers)
    yield kind("learner", config.learner.num_ranks, config.learner)
    if served is not None:
        yield kind("serving.replicas", served.most_engines, served.replicas)
        yield from scorers(config.rewards)


def local_cpus(config: Config, *, served: ServingConfig | None = None) -> int:
    """Ray CPUs that a local Ray offers: what the workers reserve, and one for the reward model's training.

    Threads share the cores, whatever their number.
    """
    asked = resources_asked(config, rollout_workers=config.rollout.most_workers, served=served)
    return max(2, math.ceil(asked.get("CPU", 0.0) + 1))
