"""A local Ray that nobody outside this machine can reach.

Ray decides when it is imported whether it may listen on every interface, so this has to come first. Serve does not ask
Ray: its replicas are kept in by a hook of each worker.
"""

from __future__ import annotations

import os
import sys
from typing import Any

LOOPBACK = "127.0.0.1"

_SETTINGS = {
    # Without it Ray rewrites the address and listens on every interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A local ray.init otherwise switches token authentication on and leaves a token that later clusters pick up.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve kills an HTTP proxy that is not ready after 5 s, and whoever waits for it fails: it may share its cores.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
}


def stay_on_loopback() -> None:
    """Set what keeps a local Ray on loopback; call it before anything imports Ray.

    Raises:
        RuntimeError: Ray is imported already, and set to listen on every interface.
    """
    if "ray" in sys.modules and os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") != "0":
        raise RuntimeError("ray was imported before cluster.loopback.stay_on_loopback() was called")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def keep_replicas_in() -> None:
    """Setup hook of every worker: a replica of Serve listens on loopback alone.

    Each replica has a gRPC server for calls from other replicas. It unpickles what anybody sends, and listens on all
    interfaces whatever the address of the node is.
    """
    from ray._common import tls_utils

    add_port = tls_utils.add_port_to_grpc_server

    def add_port_on_loopback(server: Any, address: str) -> int:
        port: int = add_port(server, address.replace("[::]", LOOPBACK))
        return port

    tls_utils.add_port_to_grpc_server = add_port_on_loopback
