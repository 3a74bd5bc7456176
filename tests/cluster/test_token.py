"""What docs/cluster.md says of Ray's token authentication: a real head with it, and clients with and without."""

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import Processes
from tests.head import RAY, free_ports, start_arguments

pytestmark = pytest.mark.slow

START_S = 120.0
CONNECT = "import ray; ray.init({address!r}, log_to_driver=False); print('nodes:', len(ray.nodes()))"


@dataclass(frozen=True)
class Head:
    """A running head; `home` holds the token, `stranger` is the home of somebody who has none."""

    port: int
    dashboard_port: int
    home: Path
    stranger: Path
    environment: dict[str, str]

    @property
    def token(self) -> str:
        return (self.home / ".ray" / "auth_token").read_text(encoding="utf-8")

    def status(self, path: str, token: str | None = None) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard_port}{path}")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    def client(self, *command: str | Path, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment | {"HOME": str(home)} | more
        return subprocess.run(
            [str(part) for part in command],
            cwd=home,
            env=environment,
            timeout=120,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    processes, folder = Processes(), tmp_path_factory.mktemp("token")
    home, stranger = folder / "home", folder / "stranger"
    home.mkdir()
    stranger.mkdir()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    plain |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as short:
        port, dashboard_port = free_ports(2)
        environment = plain | processes.environment | {"RAY_TMPDIR": short}
        head = Head(port, dashboard_port, home, stranger, environment)
        try:
            made = head.client(RAY, "get-auth-token", "--generate", home=home)
            assert made.returncode == 0, made.stdout
            popen = subprocess.Popen(
                [str(part) for part in (RAY, *start_arguments(port, dashboard_port), "--block")],
                cwd=home,
                # On a loaded machine Ray's agents come late, and it would give the head up after 30 s.
                env=environment
                | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_agent_register_timeout_ms": "120000"},
                stdout=(home / "head.log").open("wb"),
                stderr=subprocess.STDOUT,
            )
            wait_for(head)
            yield head
            popen.terminate()  # takes along what it started
            popen.wait(60)
        finally:
            processes.wait_gone(0)


def wait_for(head: Head) -> None:
    expires = time.monotonic() + START_S
    while True:
        try:
            if head.status("/api/jobs/", head.token) == 200:
                return
        except OSError:
            pass
        assert time.monotonic() < expires, f"no dashboard after {START_S:g} s"
        time.sleep(0.5)


def test_the_dashboard_s_api_asks_for_the_token(head: Head) -> None:
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary"):
        assert head.status(path) == 401
        assert head.status(path, "wrong") == 403
        assert head.status(path, head.token) == 200
    assert [head.status(path) for path in ("/", "/api/gcs_healthz")] == [200, 200]  # no data, no commands


def test_a_job_is_refused_without_it(head: Head) -> None:
    submit = (RAY, "job", "submit", "--address", f"http://127.0.0.1:{head.dashboard_port}", "--", "true")
    refused = head.client(*submit, home=head.stranger)
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stdout
    # The file alone is not enough for `ray job`.
    assert "Missing authentication token" in head.client(*submit, home=head.home).stdout
    mode = {"RAY_AUTH_MODE": "token"}
    wrong = head.client(*submit, home=head.stranger, RAY_AUTH_TOKEN="0" * 64, **mode)
    assert "Invalid authentication token" in wrong.stdout


def test_our_own_commands_say_in_one_line_what_is_missing(head: Head) -> None:
    url = f"http://127.0.0.1:{head.dashboard_port}"
    ask = (sys.executable, "-m", "cluster.cli", "status", "nobody", "--address", url)
    for variables, said in (
        ({}, "Missing authentication token"),
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE=token and the token are needed"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "Invalid authentication token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}, f"error: job nobody is not known at {url}"),
    ):
        asked = head.client(*ask, home=head.stranger, **variables)
        assert asked.returncode == 2, asked.stdout
        assert said in asked.stdout
        assert asked.stdout.startswith("error: ")
        assert asked.stdout.count("\n") == 1


def test_a_driver_needs_it(head: Head) -> None:
    connect = (sys.executable, "-c", CONNECT.format(address=f"127.0.0.1:{head.port}"))
    refused = head.client(*connect, home=head.stranger, RAY_AUTH_MODE="disabled")
    assert refused.returncode != 0
    assert "nodes:" not in refused.stdout
    assert "nodes: 1" in head.client(*connect, home=head.home, RAY_AUTH_MODE="token").stdout
    by_variable = head.client(*connect, home=head.stranger, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=head.token)
    assert "nodes: 1" in by_variable.stdout
    copied = head.stranger / "token"
    copied.write_text(head.token, encoding="utf-8")
    by_path = head.client(*connect, home=head.stranger, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(copied))
    assert "nodes: 1" in by_path.stdout


def test_a_head_does_not_start_without_one(head: Head) -> None:
    refused = head.client(RAY, *start_arguments(*free_ports(2)), home=head.stranger, RAY_AUTH_MODE="token")
    assert refused.returncode != 0
    assert "no authentication token was found" in refused.stdout


def test_ray_leaves_the_file_readable_for_everybody(head: Head) -> None:
    """Why the page says chmod 600."""
    assert (head.home / ".ray" / "auth_token").stat().st_mode & 0o077
