"""Nothing of a local Ray may be reachable from another machine."""

import ipaddress
import subprocess
import sys
import time
from typing import Any

import psutil
from ray import serve

from tests.command import Processes


class Nothing:
    """A deployment that does nothing."""


def listening(process: psutil.Process) -> list[str]:
    """Addresses on which a process accepts TCP connections."""
    try:
        return [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def on_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


def test_a_local_ray_listens_on_loopback_alone(ray_session: Processes) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # daemons open their ports one after the other
        sockets = {
            (process.name(), address)
            for process in psutil.Process().children(recursive=True)
            for address in listening(process)
        }
        if len(sockets) >= 3:
            break
        time.sleep(0.2)
    assert len(sockets) >= 3
    assert {socket for socket in sockets if not on_loopback(socket[1])} == set()


def test_replicas_of_serve_listen_on_loopback_alone(ray_session: Processes) -> None:
    replica: Any = serve.deployment(Nothing, name="nothing", ray_actor_options={"num_cpus": 0})
    serve.run(replica.bind(), name="loopback-test", route_prefix=None)
    try:
        (process,) = ray_session.alive("ray::ServeReplica:loopback-test:nothing")
        addresses = listening(process)
        assert addresses, "its gRPC server: a Ray without one needs no hook any more"
        assert [address for address in addresses if not on_loopback(address)] == []
    finally:
        serve.delete("loopback-test")


def test_ray_imported_first_is_an_error() -> None:
    code = "import ray; from cluster.loopback import stay_on_loopback; stay_on_loopback()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={})
    assert ended.returncode == 1
    assert "ray was imported before" in ended.stderr
