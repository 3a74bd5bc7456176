"""A Ray cluster of several nodes on this machine, in this process: nodes come, are drained, and are killed.

`prepare()` has to come before anything imports Ray: it keeps the cluster on loopback and has a dead node noticed in 2 s
instead of 15.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from cluster.loopback import stay_on_loopback

_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    # On a loaded machine Ray's agents come late, and a node would be given up after 30 s.
    "RAY_agent_register_timeout_ms": "120000",
}
_STORE_BYTES = 100 << 20


def prepare(folder: Path) -> None:
    """Set the environment for a cluster with its files in `folder`, a short path: sockets are in it.

    Raises:
        RuntimeError: Ray is imported already.
    """
    if "ray" in sys.modules:
        raise RuntimeError("ray was imported before tests.nodes.prepare() was called")
    stay_on_loopback()
    os.environ.update(_HEALTH | {"RAY_TMPDIR": str(folder)})
    (folder / "ray").mkdir(parents=True, exist_ok=True)


class NodeCluster:
    """A head that stays, and nodes. Killing one is killing its raylet: what runs there dies with it."""

    def __init__(self, *, head_cpus: int, head_resources: dict[str, float] | None = None) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": head_cpus,
                "resources": head_resources or {},
                "object_store_memory": _STORE_BYTES,
                "include_dashboard": False,
                "node_ip_address": "127.0.0.1",
            },
        )
        self._nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def node_ids(self) -> list[str]:
        """All but the head, oldest first."""
        return list(self._nodes)

    def add(self, *, num_cpus: int, resources: dict[str, float], num_gpus: int = 0) -> str:
        """A new node; returns its id. Ray believes in GPUs that it claims."""
        node = self._cluster.add_node(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            resources=resources,
            object_store_memory=_STORE_BYTES,
            node_ip_address="127.0.0.1",
        )
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def drain(self, node_id: str, *, notice_s: float) -> None:
        """Give notice, as a cloud does before it takes a node back. It goes by itself as soon as nothing runs there."""
        import ray
        from ray.core.generated import autoscaler_pb2

        raylet: Any = ray._raylet
        reasons: Any = autoscaler_pb2
        gcs = raylet.GcsClient(address=self.address)
        reason = reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why_not = gcs.drain_node(node_id, reason, "a test", int((time.time() + notice_s) * 1000))
        if not accepted:
            raise RuntimeError(f"node {node_id} is not drained: {why_not}")

    def kill(self, node_id: str) -> None:
        """The node is gone, at once and without a word."""
        self._cluster.remove_node(self._nodes.pop(node_id), allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()
