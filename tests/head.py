"""A head of a Ray cluster as `ray start --head` makes it, on loopback, with the dashboard that takes jobs."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.command import Processes

RAY = Path(sys.executable).with_name("ray")
START_S = 180.0


@contextmanager
def ray_head(folder: Path, *, num_cpus: int, **variables: str) -> Iterator[str]:
    """The URL of the dashboard of a head with `variables` in its environment; afterwards nothing of it is left."""
    with ray_head_and_address(folder, num_cpus=num_cpus, **variables) as (url, _):
        yield url


@contextmanager
def ray_head_and_address(folder: Path, *, num_cpus: int, **variables: str) -> Iterator[tuple[str, str]]:
    """The same, and the address that drivers connect to."""
    processes, port = Processes(), free_ports(2)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "RAY_AUTH"))}
    plain["PATH"] = f"{RAY.parent}{os.pathsep}{plain['PATH']}"  # the `python` of a job's entrypoint
    plain |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as short:
        with (folder / "head.log").open("wb") as log:
            popen = subprocess.Popen(
                [str(RAY), *start_arguments(*port, num_cpus=num_cpus), "--block"],
                cwd=folder,
                # On a loaded machine Ray's agents come late, and it would give the head up after 30 s.
                env=plain | processes.environment | loaded(short) | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            url = f"http://127.0.0.1:{port[1]}"
            wait_for_jobs(url, popen)
            yield url, f"127.0.0.1:{port[0]}"
            popen.terminate()  # takes along what it started
            popen.wait(60)
        finally:
            popen.kill()
            popen.wait(30)
            processes.wait_gone(0)


def loaded(ray_folder: str) -> dict[str, str]:
    return {"RAY_TMPDIR": ray_folder, "RAY_agent_register_timeout_ms": "120000"}


def start_arguments(port: int, dashboard_port: int, *, num_cpus: int = 1) -> list[str]:
    agent_port, client_port = free_ports(2)  # at Ray's own another cluster may listen, and then no job starts
    ports = [f"--port={port}", f"--dashboard-port={dashboard_port}", "--dashboard-host=127.0.0.1"]
    ports += [f"--dashboard-agent-listen-port={agent_port}", f"--ray-client-server-port={client_port}"]
    return ["start", "--head", *ports, f"--num-cpus={num_cpus}", f"--object-store-memory={200 << 20}"]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def wait_for_jobs(url: str, popen: subprocess.Popen[bytes]) -> None:
    expires = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/api/jobs/", timeout=20) as response:
                if response.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            pass
        assert popen.poll() is None, "the head ended"
        assert time.monotonic() < expires, f"no dashboard after {START_S:g} s"
        time.sleep(0.3)
