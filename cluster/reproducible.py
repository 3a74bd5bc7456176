"""What has to be the same for the learner to compute the same bits again from the same batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.preflight.run_folder import flat
from contracts.config import Config

_DECISIVE = (
    "model.path",
    "model.dtype",
    "model.critic_path",
    "seed",
    "sampling",
    "algorithm",
    "training",
    "streaming.stale",
)


def decisive_settings(config: Config) -> dict[str, Any]:
    """The settings that the learner's arithmetic depends on, by dotted name."""
    every = flat(config.model_dump(mode="json"))
    found = {name: value for name, value in every.items() if name.startswith(_DECISIVE)}
    if config.training.schedule != "constant":
        found["steps"] = config.steps  # where the learning rate reaches 0
    if config.streaming.stale_tokens == "mask":
        found["streaming.max_lag_steps"] = config.streaming.max_lag_steps
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: then -> now` for whatever differs."""
    return [
        f"{name}: {then.get(name)} -> {now.get(name)}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
