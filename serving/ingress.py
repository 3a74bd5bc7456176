"""The door of a serving application: everything that HTTP callers ask goes through it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from ray.serve.handle import DeploymentHandle

from contracts.serving import ServingConfig

# A component of the reward: (messages, response) -> (score, version). Raises ValueError for what it cannot score.
Scorer = Callable[[list[dict[str, str]], str], Awaitable[tuple[float, str]]]


class Ingress:
    """The deployment that callers reach: one replica, `max_ongoing_requests` large, since it bounds its own queue.

    Bind it as `serve.deployment(Ingress).options(num_replicas=1, max_ongoing_requests=10_000).bind(...)`: the class
    is wrapped by `serve.ingress` already, and is no deployment yet.

    It consumes HTTP requests. A request waits for a place in an engine, at most `request_s`, and is refused at once
    where `limits.max_waiting` others wait already. Each call to a replica or to the keeper has a deadline.

    Args:
        config: of the application; keys are read from `config.keys` and HEADRACE_API_KEYS in its own process.
        folder: `output_dir/serving`, for feedback.sqlite and, with `log_prompts`, prompts.jsonl.
        live: of the deployment `live` (`PolicyReplica`); `answer` is called with `options(stream=True)`.
        versions: of the deployment `versions` (`VersionKeeper`).
        pinned: by version, those of the deployments `pinned-VERSION`.
        scorers: by name, the weight of each component of the reward and a picklable function that asks it.
    """

    def __init__(
        self,
        config: ServingConfig,
        folder: Path,
        live: DeploymentHandle,
        versions: DeploymentHandle,
        pinned: Mapping[int, DeploymentHandle] | None = None,
        scorers: Mapping[str, tuple[float, Scorer]] | None = None,
    ) -> None:
        raise NotImplementedError
