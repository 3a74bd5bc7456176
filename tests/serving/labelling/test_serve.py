"""The labelling application on a real Ray Serve, as the benchmark runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import Processes
from tests.head import free_ports
from tests.postgresql import Server

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_eight_annotators_at_once_lose_no_vote(kind: str, short_folder: Path, request: pytest.FixtureRequest) -> None:
    processes = Processes()
    (port,) = free_ports(1)
    store = []
    if kind == "postgresql":
        server: Server = request.getfixturevalue("postgresql_server")
        store = ["--store", server.new_database()]
    sizes = ["--annotators", "8", "--pairs", "20", "--votes", "3", "--lost", "0.3", "--port", str(port)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.labelling", *sizes, *store],
        cwd=ROOT,
        env=processes.environment | {"PATH": "/usr/bin:/bin", "RAY_TMPDIR": str(short_folder)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "8 annotators at once" in ended.stdout
    assert processes.wait_gone() == []
