"""Where workers land on a cluster of several nodes that claim GPUs, and where a learner goes whose node leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(short_folder: Path) -> dict[str, Any]:
    """Of tests/cluster/placed_nodes.py, in a process of its own."""
    command = [sys.executable, "-m", "tests.cluster.placed_nodes", str(short_folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=480
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_an_engine_over_four_gpus_is_refused_where_six_are_on_three_nodes(seen: dict[str, Any]) -> None:
    assert seen["refused"] == (
        "rollout: one worker asks for 1 CPU and 4 GPU, and that has to be on one node; no node is that large or could "
        "be started: 2 GPU at most; lower what one worker asks for, or start larger nodes"
    )


def test_it_waits_aloud_for_a_node_with_all_four_and_gets_them(seen: dict[str, Any]) -> None:
    assert seen["pending"] == "waits for 4 GPU on one node; no node is that large: 2 GPU at most"
    assert seen["alone"] == [[seen["large"], [0, 1, 2, 3]]]


def test_engines_over_two_gpus_never_share_one(seen: dict[str, Any]) -> None:
    taken = [(node, gpu) for node, gpus in seen["beside"] for gpu in gpus]
    assert len(set(taken)) == len(taken) == 4
    assert [len(gpus) for _, gpus in seen["beside"]] == [2, 2]


def test_a_learner_leaves_before_its_node_does_and_loses_nothing(seen: dict[str, Any]) -> None:
    """It shared the node that leaves, the only one with room for both ranks; now there is one on each of the others."""
    quiet, before, after = seen["nodes"]
    assert quiet == before == [seen["leaving"]] * 2
    assert sorted(after) == sorted([seen["one"], seen["other"]])
    undisturbed, moved = seen["digests"]
    assert moved == undisturbed
    assert seen["told"] == [
        ["start", "the learner", "holds version 0"],
        ["start", "the learner", "holds version 0"],
        ["restart", "the learner", "goes on after step 1"],
    ]
