"""How many requests an engine works on at once where nobody has said so, and when another engine is added."""

import os
from typing import Any

import pytest

from contracts.config import ConfigError
from contracts.loading import validate
from contracts.serving import ServingConfig, suited_running


def running(**replicas: Any) -> int:
    return ServingConfig.model_validate({"replicas": replicas}).replicas.max_running


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ({"threads": 1}, 16),
        ({"threads": 2}, 32),  # what two cores were fastest with
        ({"threads": 8}, 128),
        ({"threads": 96}, 128),
        ({"num_gpus": 1}, 256),
        ({"num_gpus": 0.5, "threads": 2}, 256),
        ({"threads": 2, "max_running": 7}, 7),
        ({"num_gpus": 1, "max_running": 1000}, 1000),
    ],
)
def test_it_follows_from_the_device(replicas: dict[str, Any], expected: int) -> None:
    assert running(**replicas) == expected


def test_without_threads_the_cores_of_the_machine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert running() == suited_running(0.0, None) == 48


def test_what_is_read_back_has_the_number_of_the_machine_that_wrote_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    written = ServingConfig().model_dump()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert ServingConfig.model_validate(written).replicas.max_running == 32


def test_a_wrong_neighbour_is_told_and_nothing_else() -> None:
    run = {"model": {"path": "m"}, "prompts": {"path": "p.jsonl"}, "rewards": [{"name": "none", "function": "a:b"}]}
    with pytest.raises(ConfigError) as told:
        validate(run | {"output_dir": "run", "serving": {"replicas": {"num_gpus": -1}}}, source="here")
    assert "serving.replicas.num_gpus" in str(told.value)
    assert "more" not in str(told.value)


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ({"threads": 1}, 11.2),
        ({"threads": 2}, 22.4),
        ({"num_gpus": 1}, 179.2),
        ({"max_running": 1}, 0.7),
        ({"max_running": 8, "target_running": 3}, 3.0),
    ],
)
def test_another_engine_is_wanted_before_one_is_full(replicas: dict[str, Any], expected: float) -> None:
    config = ServingConfig.model_validate({"replicas": replicas | {"max_replicas": 2}, "limits": {"max_waiting": 0}})
    assert config.replicas.target_running == expected < config.replicas.max_running


def refused(serving: dict[str, Any]) -> str:
    run = {"model": {"path": "m"}, "prompts": {"path": "p.jsonl"}, "rewards": [{"name": "none", "function": "a:b"}]}
    with pytest.raises(ConfigError) as told:
        validate(run | {"output_dir": "run", "serving": serving}, source="here")
    return str(told.value)


def test_bounds_between_which_it_could_never_grow_are_refused() -> None:
    replicas = {"max_replicas": 2, "max_running": 8, "target_running": 9}
    told = refused({"replicas": replicas})
    assert "\n" not in told
    assert "serving.replicas: target_running is 9, must be at most max_running (8)" in told
    told = refused({"replicas": replicas | {"target_running": 8}, "limits": {"max_waiting": 0}})
    assert "\n" not in told
    assert "serving: replicas.target_running is 8, must be below replicas.max_running (8)" in told
    for serving in (
        {"replicas": replicas | {"target_running": 8}, "limits": {"max_waiting": 1}},  # the one that waits counts
        {"replicas": replicas | {"max_replicas": 1}},  # nothing is to grow
    ):
        assert ServingConfig.model_validate(serving).replicas.max_running == 8
