"""A head with Ray's own autoscaler (version 2), whose nodes are raylets on this machine, on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from tests.command import Processes
from tests.head import START_S, free_ports

_STORE_BYTES = 100 << 20
_LISTS = (
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


class FakeNodes(FakeMultiNodeProvider):
    """Ray's own, which passes a node's memory on where no custom resource may stand."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        plain = {name: amount for name, amount in resources.items() if name != "memory"}
        plain["object_store_memory"] = _STORE_BYTES
        super()._create_node_with_resources_and_labels(node_config, tags, count, plain, labels)


def cluster_file(port: int, *, max_nodes: int, idle_s: float) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads: up to `max_nodes` nodes, each with one unit of `rollout`."""
    return {
        "cluster_name": "paced",
        "max_workers": max_nodes,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": float(max_nodes),
        "provider": {
            "type": "external",
            "module": f"{__name__}.{FakeNodes.__name__}",
            "launch_multiple": True,
            "foreground_node_launch": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "auth": {},
        # Ray fills these in for the clouds that it knows, and fails where they are missing for others.
        **{name: [] for name in _LISTS},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "rollout": {
                "resources": {"CPU": 1, "rollout": 1},
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_nodes,
            },
        },
    }


@contextmanager
def autoscaled_head(folder: Path, *, max_nodes: int, idle_s: float) -> Iterator[str]:
    """The address of the head, which has 100 units of `fixed`; afterwards nothing of it is left."""
    import yaml

    processes, (port,) = Processes(), free_ports(1)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster_file(port, max_nodes=max_nodes, idle_s=idle_s)))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=0", f"--object-store-memory={2 * _STORE_BYTES}", "--include-dashboard=false"]
    command += [f"--resources={json.dumps({'fixed': 100})}", "--node-ip-address=127.0.0.1"]
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_agent_register_timeout_ms": "120000",
    }
    with (folder / "head.log").open("wb") as log:
        popen = subprocess.Popen(
            [*command, f"--autoscaling-config={folder / 'cluster.yaml'}"],
            env=os.environ | processes.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_up(popen, folder / "head.log")
        yield f"127.0.0.1:{port}"
    finally:
        popen.terminate()  # takes along what it started
        try:
            popen.wait(60)
        finally:
            processes.wait_gone(10)


def _wait_up(popen: subprocess.Popen[bytes], log: Path) -> None:
    expires = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if popen.poll() is not None or time.monotonic() > expires:
            raise RuntimeError(f"the head did not come up: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.5)
