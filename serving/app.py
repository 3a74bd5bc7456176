"""The Ray Serve application of a served policy: its door, the keeper of versions, the gate, and the replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve

from contracts.records import Prompt
from contracts.serving import EngineReplicaConfig, ServingConfig
from serving.archive import weights_key
from serving.gate_engine import GateEngine, GateSettings, RewardScorer
from serving.ingress import Ingress
from serving.listening import ON_THE_HEAD
from serving.records import LIVE, VERSIONS, StartWeights
from serving.replica import PolicyReplica, ReplicaSettings
from serving.versions import VersionKeeper

_CHECK_PERIOD_S = 2.0
_KEEPER_STOP_S = 5.0  # replicas wait for orders there, and nobody else loses anything
_STOP_MARGIN_S = 10.0
_INGRESS_REQUESTS = 10_000  # it bounds its own queue, and says 503 itself
_KEEPER_REQUESTS = 1000  # each replica waits in one


@dataclass(frozen=True)
class Policy:
    """What is served: the weights to begin with, and how long prompt and answer may be together."""

    start: StartWeights
    max_context_tokens: int


def build(
    config: ServingConfig,
    policy: Policy,
    folder: Path,
    *,
    scorers: Mapping[str, tuple[float, RewardScorer]],
    start_s: float,
    health_s: float,
    gate_prompts: Sequence[Prompt] = (),
    listens: bool = False,
) -> serve.Application:
    """The whole application, to be run under `config.application`.

    Args:
        folder: `output_dir/serving`: the history, the weights, the feedback.
        scorers: the reward's components by name, each with its weight.
        start_s: a replica loads the model and takes the current version.
        health_s: a replica answers a health check; after three it is replaced.
        gate_prompts: what versions are compared on, where `config.gate` is set.
        listens: the ingress answers HTTP itself, on the head; else Ray Serve's proxies have to be there.

    Raises:
        ValueError: the key in `folder` cannot be read.
    """
    key = weights_key(folder)
    checks: dict[str, Any] = {"health_check_period_s": _CHECK_PERIOD_S, "health_check_timeout_s": health_s}
    # What runs is finished before a process ends; an answer takes no longer than request_s.
    finishing: dict[str, Any] = {
        "graceful_shutdown_timeout_s": config.request_s + _STOP_MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    keeper: Any = serve.deployment(
        VersionKeeper,
        name=VERSIONS,
        num_replicas=1,
        max_ongoing_requests=_KEEPER_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_KEEPER_STOP_S,
        **checks,
    )
    gate: Any = None
    if config.gate is not None:
        judging: Any = serve.deployment(
            GateEngine,
            name="gate",
            num_replicas=1,
            max_ongoing_requests=1,  # two versions in one engine: it judges one candidate after the other
            ray_actor_options=_reserved(config.replicas),
            graceful_shutdown_timeout_s=_KEEPER_STOP_S,
            **checks,
        )
        gate = judging.bind(
            GateSettings(config, policy.start, policy.max_context_tokens, tuple(gate_prompts), scorers, start_s, key)
        )
    versions = keeper.bind(config, folder, policy.start, key=key, gate=gate)

    def replica(name: str, api_name: str, **number: Any) -> serve.Application:
        deployment: Any = serve.deployment(
            PolicyReplica,
            name=name,
            max_ongoing_requests=_calls_at_once(config),
            ray_actor_options=_reserved(config.replicas),
            logging_config={"enable_access_log": False},  # one line a request: /metrics counts them
            **number,
            **checks,
            **finishing,
        )
        settings = ReplicaSettings(name, api_name, policy.start, policy.max_context_tokens, config, start_s, key)
        bound: serve.Application = deployment.bind(settings, versions)
        return bound

    ingress: Any = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=_INGRESS_REQUESTS,
        ray_actor_options={"num_cpus": 0, "resources": ON_THE_HEAD if listens else {}},
        **checks,
        **finishing,
    )
    live = replica(LIVE, config.name, **_number_of_replicas(config.replicas))
    pinned = {
        version: replica(f"pinned-{version}", f"{config.name}@{version}", num_replicas=1) for version in config.pinned
    }
    bound: serve.Application = ingress.bind(
        config, folder, live, versions, pinned=pinned, scorers=scorers, listens=listens
    )
    return bound


def _calls_at_once(config: ServingConfig) -> int:
    """Of one replica: all that the ingress lets in, so that who waits does so in the engine's own queue and begins in
    the step after another has ended. A handle whose replicas are full looks again after up to 0.5 s, with places empty
    meanwhile. Twice what runs, since a place is free a moment before the call that held it has returned.
    """
    return 2 * config.replicas.max_running + config.limits.max_waiting


def _number_of_replicas(replicas: EngineReplicaConfig) -> dict[str, Any]:
    if not replicas.scales:
        return {"num_replicas": replicas.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": replicas.target_running,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
        }
    }


def _reserved(replicas: EngineReplicaConfig) -> dict[str, Any]:
    return {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus, "resources": replicas.resources}
