"""Full disks, on a small one: nothing is half-written, nothing is trained that is not logged, what waits is said."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import experience_log, recover
from cluster.half_written import half_written
from cluster.run_log import RunLog, write_json
from contracts.disk import DiskFull, is_full
from contracts.events import Event
from contracts.stopping import StopRequest
from tests.command import rows
from tests.rollouts import scored_rollout
from tests.small_disk import MIB, SmallDisk, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 2 * MIB) as made:
        yield made


@pytest.fixture
def log(disk: SmallDisk) -> Iterator[RunLog]:
    made = RunLog(disk.folder / "run", resume_step=None)
    yield made
    made.close()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def until_full(write: Callable[[int], None]) -> int:
    """How many calls the disk took; whatever it refuses with has to be known as what it is."""
    for number in range(10_000):
        try:
            write(number)
        except OSError as error:
            if not is_full(error):
                raise
            return number
    raise AssertionError("the disk never filled up")


def test_a_line_without_room_stays_out_whole_and_may_be_written_again(disk: SmallDisk, log: RunLog) -> None:
    disk.fill(leave_bytes=64 * 1024)
    path = log.run_dir / "metrics.jsonl"
    taken = until_full(lambda step: log.metrics({"step": step, "text": "x" * 1000}))
    assert path.read_bytes().endswith(b"\n")
    assert [row["step"] for row in rows(path)] == list(range(taken))
    disk.empty()
    log.metrics({"step": taken})
    assert [row["step"] for row in rows(path)] == list(range(taken + 1))


def test_events_and_quarantine_rows_wait_for_room_in_their_order(disk: SmallDisk, log: RunLog) -> None:
    disk.fill()
    for number in range(200):
        log.event(Event("rollover", f"rollout-{number}", "x" * 100))
        log.quarantine(step=1, trajectory_id=f"t{number}", prompt_id="p", reason="bad", response="x" * 100)
    assert len(rows(log.run_dir / "events.jsonl")) < 200
    with pytest.raises(OSError, match="No space left"):  # a batch is not trained on before they are there
        log.experience(1, [scored_rollout("t")], {})
    disk.empty()
    log.experience(1, [scored_rollout("t")], {})
    assert [row["trajectory_id"] for row in rows(log.run_dir / "quarantine.jsonl")] == [f"t{n}" for n in range(200)]
    told = [row["who"] for row in rows(log.run_dir / "events.jsonl")]
    assert told == [who for number in range(200) for who in (f"rollout-{number}", f"t{number}")]


def test_of_a_batch_and_of_a_json_file_nothing_half_written_is_left(disk: SmallDisk, log: RunLog) -> None:
    batch = [scored_rollout(f"t{number}", response_text=f"{number}" * 200) for number in range(100)]
    disk.fill(leave_bytes=8 * 1024)
    for write in (
        lambda: log.experience(7, batch, {}),
        lambda: write_json(log.run_dir / "big.json", {"x": "x" * 20_000}),
    ):
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert is_full(caught.value)
        assert files(log.run_dir) == ["events.jsonl", "metrics.jsonl", "quarantine.jsonl"]
    disk.empty()
    log.experience(7, batch, {})
    assert experience_log.batch(log.run_dir, 7) == batch


class Said:
    """The lines that a person reads."""

    def __init__(self) -> None:
        self.warned: list[str] = []
        self.waited: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def waiting(self, text: str) -> None:
        self.waited.append(text)


def job_with(log: RunLog, *, disk_s: float) -> Any:
    config = SimpleNamespace(output_dir=log.run_dir, deadlines=SimpleNamespace(disk_s=disk_s))
    return SimpleNamespace(config=config, log=log, progress=Said(), stopping=StopRequest())


def test_the_run_waits_for_room_says_so_and_goes_on(disk: SmallDisk, log: RunLog) -> None:
    job = job_with(log, disk_s=20.0)
    disk.fill()

    async def check() -> None:
        batch = [scored_rollout("t")]
        writing = asyncio.create_task(recover.written(job, "the batch of step 1", lambda: log.experience(1, batch, {})))
        await asyncio.sleep(0.5)
        assert not writing.done()
        (warning,) = job.progress.warned
        assert warning.startswith("no room for the batch of step 1: 0.0 MiB are free on the disk of ")
        assert "waiting for up to 20 s" in warning
        assert "room on the disk, since 0 s" in job.progress.waited[0]
        disk.empty()
        async with asyncio.timeout(15):
            await writing

    asyncio.run(check())
    assert experience_log.steps(log.run_dir) == [1]
    (event,) = rows(log.run_dir / "events.jsonl")
    assert (event["event"], event["consequence"]) == ("disk_full", "waits for room, 20 s at most")


@pytest.mark.parametrize("stopped", [False, True])
def test_it_gives_up_after_the_deadline_or_when_it_is_asked_to_stop(
    disk: SmallDisk, log: RunLog, stopped: bool
) -> None:
    job = job_with(log, disk_s=1800.0 if stopped else 0.4)
    disk.fill()
    if stopped:
        job.stopping.set()
    why = "the run was asked to stop" if stopped else r"deadlines\.disk_s 0\.4"
    match = rf"no room for the batch of step 3: 0\.0 MiB are free .* \({why}\); none of it is lost: make room and"
    with pytest.raises(DiskFull, match=match):
        asyncio.run(recover.written(job, "the batch of step 3", lambda: log.experience(3, [scored_rollout("t")], {})))
    assert experience_log.steps(log.run_dir) == []
    assert half_written(log.run_dir) == []


def test_an_error_that_room_does_not_mend_is_raised_at_once(disk: SmallDisk, log: RunLog) -> None:
    def refuse() -> None:
        raise PermissionError("read-only file system")

    with pytest.raises(PermissionError):
        asyncio.run(recover.written(job_with(log, disk_s=1800.0), "a batch", refuse))
