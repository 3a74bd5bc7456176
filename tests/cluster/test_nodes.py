"""Nodes that drain, die and come: what the run says of them, and what it asks its parts to do."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import capacity
from cluster.nodes import Change, Nodes, changes
from contracts.config import Config, ConfigError

ROOT = Path(__file__).parents[2]
NONE: dict[str, Any] = {}


def test_what_changed_between_two_looks() -> None:
    before = Nodes({"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}, {"b": 9.0}, {})
    after = Nodes(
        {"a": "10.0.0.1", "b": "10.0.0.2", "d": "10.0.0.4"}, {"a": 30.0, "b": 8.0, "c": 1.0}, {"c": "a storm"}
    )
    assert changes(before, after) == [
        Change("d", "10.0.0.4"),
        Change("a", "10.0.0.1", left_s=30.0),
        Change("c", "10.0.0.3", gone="a storm"),
    ]
    assert changes(after, after) == []


def test_a_node_that_is_gone_was_not_only_drained() -> None:
    """Ray goes on to list it as draining for a while."""
    before, after = Nodes({"a": "10.0.0.1"}, NONE, NONE), Nodes(NONE, {"a": math.inf}, {"a": ""})
    assert changes(before, after) == [Change("a", "10.0.0.1", gone="it vanished")]


@pytest.fixture(scope="module")
def watched(short_folder: Path) -> dict[str, Any]:
    """What a real cluster's watch said while a node drained and was killed, another was killed, a third came."""
    command = [sys.executable, "-m", "tests.cluster.watched_nodes", str(short_folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_each_node_is_named_with_what_ran_there(watched: dict[str, Any]) -> None:
    draining, lost = (f"node {watched[name][:8]}" for name in ("draining", "lost"))
    told = [(event["event"], event["who"], event["consequence"]) for event in watched["events"]]
    assert told[:3] == [
        ("drain", draining, "rollout-0 moves; learner rank 0 moves"),
        ("death", draining, "rollout-0 is replaced; learner rank 0 is replaced"),
        ("death", lost, "rollout-1 is replaced"),
    ]
    assert told[3][::2] == ("start", "has joined")
    causes = [event["cause"] for event in watched["events"]]
    assert causes[0] in ("it leaves in 20 s", "it leaves in 19 s", "it leaves in 18 s")
    assert causes[1] == "it leaves, as announced"
    assert causes[2]
    assert {event["node"] for event in watched["events"]} == {"127.0.0.1"}


@pytest.mark.slow
def test_workers_are_drained_with_notice_and_at_once_without(watched: dict[str, Any]) -> None:
    draining, lost = watched["draining"], watched["lost"]
    assert [node for node, _ in watched["drained"]] == [draining, draining, lost]
    with_notice, gone, without = (deadline_s for _, deadline_s in watched["drained"])
    assert 15 < with_notice <= 20
    assert gone == without == 0


@pytest.mark.slow
def test_the_learner_may_be_moved_until_the_node_goes(watched: dict[str, Any]) -> None:
    assert set(watched["left"]) == {watched["draining"], "still"}
    assert watched["left"]["still"] == 0


@pytest.mark.slow
def test_the_free_room_of_a_node_that_leaves_does_not_count(watched: dict[str, Any]) -> None:
    """Two units were free there, one is elsewhere: Ray places nothing on it, and the learner would wait in vain."""
    assert watched["rooms"] == [[True, 2.0], [False, 1.0]]


def test_resources_that_no_node_has_are_refused_by_name(ray_session: object, tiny_config: Config) -> None:
    rollout = tiny_config.rollout.model_copy(update={"num_workers": 2, "resources": {"spot": 0.5}})
    learner = tiny_config.learner.model_copy(update={"num_ranks": 2, "resources": {"spot": 1.0, "fast": 1.0}})
    config = tiny_config.model_copy(update={"rollout": rollout, "learner": learner})
    asked = capacity.resources_asked(config)
    assert (asked["spot"], asked["fast"]) == (3.0, 2.0)
    with pytest.raises(ConfigError, match="ask for 3 of resource spot together, the cluster has 0 at most;"):
        capacity.check_capacity(config)
    capacity.check_capacity(tiny_config)
