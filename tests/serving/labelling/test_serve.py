"""The labelling application on a real Ray Serve, as the benchmark runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import Processes
from tests.head import free_ports

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_eight_annotators_at_once_lose_no_vote(short_folder: Path) -> None:
    processes = Processes()
    (port,) = free_ports(1)
    sizes = ["--annotators", "8", "--pairs", "20", "--votes", "3", "--lost", "0.3", "--port", str(port)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.labelling", *sizes],
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
