"""How whole runs end, and what they leave: full disks, a second Ctrl-C, kill -9."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.doctor import leftovers
from cluster.half_written import half_written
from cluster.preflight.run_folder import finished_checkpoints
from tests.cluster.test_train import end, steps, write_config, write_project
from tests.command import Command, Processes, rows
from tests.small_disk import MIB, small_disk

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _ray_folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))


@pytest.fixture(autouse=True)
def _no_shared_memory_is_left() -> Iterator[None]:
    before = segments()
    yield
    assert segments() - before == set()


def segments() -> set[str]:
    """Of vLLM's queues and of ours, whoever uses them."""
    return {path.name for pattern in ("psm_*", "headrace-*") for path in Path("/dev/shm").glob(pattern)}


def events(run_dir: Path, kind: str) -> list[dict[str, str]]:
    return [event for event in rows(run_dir / "events.jsonl") if event["event"] == kind]


def test_a_run_on_a_disk_that_fills_up_goes_on_and_ends_with_one_clear_line(tiny_model: Path, tmp_path: Path) -> None:
    """Full before the checkpoint of step 4, room again from step 6, full again before the last one."""
    config = write_project(tmp_path, tiny_model) | {"steps": 12, "logging": {"tensorboard": False}}
    config["checkpoint"] = {"every_steps": 4}
    with small_disk(tmp_path / "disk", 64 * MIB) as disk:
        run_dir = disk.folder / "run"
        write_config(tmp_path, config | {"output_dir": str(run_dir)})
        with Command("train", "config.yaml", cwd=tmp_path) as command:
            command.until(lambda: steps(run_dir) >= 1, "step 1")
            disk.fill(leave_bytes=MIB // 2)  # enough for what is logged
            command.until(lambda: bool(events(run_dir, "disk_full")), "a checkpoint without room")
            assert half_written(run_dir) == []
            command.until(lambda: steps(run_dir) >= 6, "step 6")
            assert finished_checkpoints(run_dir) == []
            disk.empty()
            command.until(lambda: bool(events(run_dir, "checkpoint")), "a checkpoint")
            late = finished_checkpoints(run_dir)
            assert late[0] in (6, 7, 8)
            disk.fill(leave_bytes=MIB // 2)
            ended = end(command, run_dir)
        assert ended.status == 1, ended.output
        assert ended.left == []
        last = ended.output.splitlines()[-1]
        assert re.match(
            r"error: DiskFull: no room for the checkpoint of step 12: 0\.\d MiB are free on the disk of", last
        )
        assert re.search(r"it needs about \d+\.\d MiB", last)
        assert finished_checkpoints(run_dir)[0] == late[0]
        assert half_written(run_dir) == []
        disk.empty()
        with Command("train", "config.yaml", "resume=true", cwd=tmp_path) as command:
            resumed = end(command, run_dir)
        assert resumed.status == 0, resumed.output
        assert finished_checkpoints(run_dir)[-1] == 12
        assert [row["step"] for row in rows(run_dir / "metrics.jsonl")] == list(range(1, 13))


def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing_half_written(tiny_model: Path, tmp_path: Path) -> None:
    write_config(tmp_path, write_project(tmp_path, tiny_model) | {"steps": 1000})
    run_dir = tmp_path / "run"
    with Command("train", "config.yaml", cwd=tmp_path) as command:
        command.until(lambda: steps(run_dir) >= 2, "step 2")
        command.ctrl_c()
        command.until(lambda: "stopping: " in command.output, "the first Ctrl-C")
        command.ctrl_c()
        ended = end(command, run_dir)
    assert ended.status == 130, ended.output
    assert ended.left == []
    assert half_written(run_dir) == []


def test_nothing_outlives_a_driver_that_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    """kill -9 of the driver alone: its Ray and engines end by themselves, and resume=true clears the folder."""
    write_config(tmp_path, write_project(tmp_path, tiny_model) | {"steps": 8, "checkpoint": {"every_steps": 2}})
    run_dir = tmp_path / "run"
    with Command("train", "config.yaml", cwd=tmp_path) as command:
        command.until(lambda: len(finished_checkpoints(run_dir)) == 2, "two checkpoints")
        command.kill_driver()
        # Most are gone in seconds. Ray's agents try for 60 s to tell a GCS that is dead as well why they end.
        assert gone(command.processes, 90.0) == []
    assert leftovers.orphans() == []
    (run_dir / "checkpoints" / "step-000099.partial").mkdir(exist_ok=True)
    newest = run_dir / "checkpoints" / f"step-{finished_checkpoints(run_dir)[-1]:06d}"
    (newest / "state" / "learner.json").unlink()
    with Command("train", "config.yaml", "resume=true", cwd=tmp_path) as command:
        ended = end(command, run_dir)
    assert ended.status == 0, ended.output
    assert half_written(run_dir) == []
    (resumed,) = events(run_dir, "resume")
    assert f"passed over: {newest.relative_to(tmp_path)}/state/learner.json: named in the manifest" in resumed["cause"]


def gone(processes: Processes, timeout_s: float) -> list[str]:
    """Who still runs after that time."""
    expires = time.monotonic() + timeout_s
    while (left := processes.alive()) and time.monotonic() < expires:
        time.sleep(0.5)
    return [" ".join(process.cmdline())[:100] for process in left]
