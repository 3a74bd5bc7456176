"""A served policy from a Serve config file: `serve deploy FILE`, or the RayService of cluster/kuberay/.

    applications:
      - name: headrace-serving-policy              # serving.name after headrace-serving-: training finds it by that
        route_prefix: /
        import_path: cluster.serve_file:application
        args: {config: /shared/serve.yaml, overrides: [serving.host=0.0.0.0]}
      - name: headrace-serving-policy-score-helpful   # one for each of `rewards`: what /v1/score asks
        import_path: cluster.serve_file:reward
        args: {config: /shared/serve.yaml, component: helpful}

Where HTTP listens the file says itself (`http_options`); `serving.host` has to agree, as it decides whether keys are
needed. Paths are those of the cluster's nodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.reward import RewardHandle, reward_application
from cluster.application import Scorer
from cluster.preferences import trained_reward_model
from cluster.reward_rollout import newest
from cluster.serve_command import check_serving
from contracts import loading as configuration
from contracts.config import Config, ConfigError, RewardConfig
from contracts.waiting import answer
from models import bundled
from serving.app import Policy, build


def application(args: Mapping[str, Any]) -> serve.Application:
    """The policy of `config` behind the OpenAI API.

    Raises:
        ConfigError: what `headrace serve` would refuse; a gate, which needs scorers before there are any.
    """
    config = _config(args)
    job = check_serving(config)
    serving = job.application.serving
    if serving.gate is not None:
        raise ConfigError("serving.gate: not from a Serve config file; use `headrace serve`, or serving.start of a run")
    scorers = {
        component.name: (
            component.weight,
            NamedScorer(component, _score_application(config, component), config.deadlines.score_s),
        )
        for component in job.application.components
    }
    start = replace(job.start, path=bundled.resolve(job.start.path))
    return build(
        serving,
        Policy(start, config.model.max_context_tokens),
        config.output_dir.resolve() / "serving",
        scorers=scorers,
        start_s=config.deadlines.start_s,
        health_s=config.deadlines.health_s,
    )


def reward(args: Mapping[str, Any]) -> serve.Application:
    """What scores for `component` of `config.rewards`.

    Raises:
        ConfigError: there is no such component.
    """
    config = _config(args)
    component = next((each for each in config.rewards if each.name == args.get("component")), None)
    if component is None:
        names = ", ".join(each.name for each in config.rewards)
        raise ConfigError(f"args.component is {args.get('component')!r}, rewards are: {names}")
    own = trained_reward_model(config.output_dir) if component.model == "preferences" else component.model
    path = newest(config.output_dir).get(component.name, own)
    app, _ = reward_application(
        component,
        config.reward_workers,
        model_path=None if path is None else str(path),
        dtype=config.model.dtype,
        max_tokens=config.model.max_context_tokens,
        health_s=config.deadlines.health_s,
    )
    return app


@dataclass(frozen=True)
class NamedScorer:
    """Asks a component of the reward that is an application of its own and may come later than who asks."""

    component: RewardConfig
    application: str
    deadline_s: float

    async def __call__(
        self, messages: list[dict[str, str]], response: str, columns: Mapping[str, Any] | None = None
    ) -> tuple[float, str]:
        """As `Scorer`; RayServeException while it is not there."""
        who = f"reward component {self.component.name}"
        found = asyncio.to_thread(_handle, self.application)
        handle = await answer(found, who="Ray Serve", asked=f"find {who}", deadline_s=self.deadline_s)
        scorer = Scorer(RewardHandle(self.component, handle, self.application), self.deadline_s)
        return await scorer(messages, response, columns)


@lru_cache
def _handle(name: str) -> DeploymentHandle:
    return serve.get_app_handle(name)


def _score_application(config: Config, component: RewardConfig) -> str:
    assert config.serving is not None
    return f"{config.serving.application}-score-{component.name}"


def _config(args: Mapping[str, Any]) -> Config:
    if "config" not in args:
        raise ConfigError("args.config: required, the path of a configuration on the cluster's nodes")
    # It runs on the cluster, whose Serve has the port: nothing is checked about this machine.
    config = configuration.load(args["config"], [*args.get("overrides", ()), "ray.address=auto"])
    if config.serving is None:
        raise ConfigError(f"{args['config']}: has no section `serving`")
    return config
