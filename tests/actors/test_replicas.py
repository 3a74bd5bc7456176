"""Replicas that are killed, stopped, or crash whenever they start: real ones, on Ray Serve."""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.schema import ReplicaState

from actors import replicas
from actors.reward import RewardHandle, Score, ScoreRequest, deploy_reward
from contracts.config import RewardConfig
from contracts.events import Event
from contracts.waiting import NoAnswer
from contracts.workers import ReplicaConfig
from tests.command import Processes
from tests.conftest import RunCoroutine

HEALTH_S = 2.0
WHO = "reward component fragile"


async def deploy() -> RewardHandle:
    return await deploy_reward(
        RewardConfig(name="fragile", function="tests.actors.fragile:behave"),
        ReplicaConfig(num_cpus=0.1, max_batch_size=4, batch_wait_s=0.05),
        application="test-fragile",
        model_path=None,
        dtype="float32",
        max_tokens=64,
        start_s=240,
        health_s=HEALTH_S,
    )


@pytest.fixture
def one_replica(ray_session: Processes, run: RunCoroutine) -> Iterator[RewardHandle]:
    yield run(deploy(), timeout_s=300)
    serve.delete("test-fragile")


async def score(handle: RewardHandle, do: str = "number", number: float = 1.0, *, deadline_s: float = 120.0) -> Score:
    return await handle.score(ScoreRequest([], "q", "yes", {"do": do, "number": number}), deadline_s=deadline_s)


async def process_of(handle: RewardHandle) -> int:
    return int((await score(handle, "process")).value)


@asynccontextmanager
async def watched(notes: list[Event], deadline_s: float = 60.0) -> AsyncIterator[asyncio.Task[None]]:
    watching = replicas.watch({"test-fragile": WHO}, on_event=notes.append, deadline_s=deadline_s)
    task = asyncio.create_task(watching)
    for _ in range(2):  # its own question was asked before these: it has seen who runs
        await asyncio.sleep(0.2)
        await replicas._details(60)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_the_only_replica_is_lost_and_its_requests_are_answered_by_the_next(
    one_replica: RewardHandle, run: RunCoroutine, end: signal.Signals
) -> None:
    """Killed or frozen while it scores: Serve starts another, and who waits gets an answer from that one."""
    notes: list[Event] = []

    async def check() -> tuple[int, list[Score], int]:
        async with watched(notes):
            before = await process_of(one_replica)
            asked = [asyncio.create_task(score(one_replica, "sleep", 1.0)) for _ in range(3)]
            await asyncio.sleep(0.5)
            os.kill(before, end)
            answers = list(await asyncio.gather(*asked))
            for _ in range(600):
                if len(notes) == 2:
                    break
                await asyncio.sleep(0.2)
            return before, answers, await process_of(one_replica)

    before, answers, after = run(check())
    assert [answer.value for answer in answers] == [1.0] * 3
    assert after != before
    assert not psutil.pid_exists(before)
    death, restart = notes
    assert (death.event, death.who, death.node) == ("death", WHO, "127.0.0.1")
    assert f"process {before}" in death.cause
    assert death.consequence == "its requests are sent again, Serve starts another"
    assert (restart.event, restart.who, restart.node) == ("restart", WHO, "127.0.0.1")
    assert restart.consequence.startswith(f"replica {answers[0].replica} took over after ")


@pytest.mark.slow
def test_one_that_stands_still_is_ended_when_it_is_given_up(one_replica: RewardHandle, run: RunCoroutine) -> None:
    """Serve would give it 20 s to finish first, and a policy's replica as long as an answer may take."""
    notes: list[Event] = []

    async def check() -> float:
        async with watched(notes), asyncio.timeout(120):
            stands = await process_of(one_replica)
            os.kill(stands, signal.SIGSTOP)
            while not notes:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            given_up = time.monotonic()
            while psutil.pid_exists(stands) and psutil.Process(stands).status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            return time.monotonic() - given_up

    assert run(check()) < 12.0
    assert notes[0].event == "death"


def of_serve(num_wanted: int, *running: str) -> dict[str, Any]:
    """What Serve says of a deployment."""
    rows = [{"replica_id": name, "state": ReplicaState.RUNNING, "pid": 1, "node_ip": "10.0.0.9"} for name in running]
    row = {"name": "live", "target_num_replicas": num_wanted, "replicas": rows, "status_trigger": "", "status": ""}
    return {"policy": {"deployments": {"live": row}}}


def test_replicas_that_come_and_go_with_the_load_are_no_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        *(of_serve(1, "a"), of_serve(2, "a"), of_serve(2, "a", "b"), of_serve(1, "b")),  # grown and shrunk
        *(of_serve(2, "b"), of_serve(2, "b", "c"), of_serve(2, "c"), of_serve(2, "c", "d")),  # b has died
        *(of_serve(1), of_serve(1, "e"), of_serve(0)),  # both, of which one was wanted; then the application is removed
    ]
    notes: list[Event] = []
    told_after: list[int] = []

    async def details(_: float) -> dict[str, Any]:
        told_after.append(len(notes))
        if not said:
            raise asyncio.CancelledError
        return said.pop(0)

    monkeypatch.setattr(replicas, "_details", details)
    monkeypatch.setattr(replicas, "_LOOK_AGAIN_S", 0.0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(replicas.watch({"policy": WHO}, on_event=notes.append, deadline_s=1.0))
    told = [(note.event, note.cause.split(",")[0]) for note in notes]
    assert told == [
        ("death", "replica b"),
        ("restart", "replica b was lost"),
        ("death", "replica d"),
        ("restart", "replica d was lost"),
    ]
    assert told_after[:8] == [0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.slow
def test_a_busy_replica_is_not_taken_for_dead(one_replica: RewardHandle, run: RunCoroutine) -> None:
    """Longer than three health checks in one call, in Python that leaves the interpreter to nobody for long."""
    notes: list[Event] = []

    async def check() -> tuple[Score, int]:
        async with watched(notes):
            return await score(one_replica, "spin", 5 * HEALTH_S), await process_of(one_replica)

    answer, _ = run(check())
    assert answer.value == 5 * HEALTH_S
    assert notes == []


@pytest.mark.slow
def test_a_replica_that_crashes_on_each_start_ends_the_run_with_its_traceback(
    one_replica: RewardHandle, run: RunCoroutine, short_folder: Path
) -> None:
    crash = short_folder / "crash"
    notes: list[Event] = []

    async def check() -> None:
        async with watched(notes) as task:
            os.kill(await process_of(one_replica), signal.SIGKILL)
            await asyncio.wait_for(task, 200)

    crash.touch()
    try:
        with pytest.raises(RuntimeError, match=f"{WHO}: its replicas keep failing to start: .* 3 times") as caught:
            run(check())
    finally:
        crash.unlink()
    assert "Traceback" in str(caught.value)
    assert "RuntimeError: the judge has lost its mind" in str(caught.value)
    assert [note.event for note in notes] == ["death"]


def test_what_never_answers_is_named_with_the_replica_that_was_lost_last() -> None:
    """Its requests were sent again, with pauses, to the end of the deadline."""
    sent: list[float] = []

    async def dies() -> float:
        sent.append(time.monotonic())
        raise RayActorError(error_msg="The actor died.\n\tpid: 7\n\tip: 10.0.0.9\nkilled by SIGKILL")

    match = (
        r"the judge did not answer within 1 s, asked 1\.\d s ago to score; \d times the replica on node 10\.0\.0\.9 "
        r"was lost, the last time: The actor died\. pid: 7 ip: 10\.0\.0\.9 killed by SIGKILL"
    )
    with pytest.raises(NoAnswer, match=match):
        asyncio.run(replicas.ask(dies, who="the judge", asked="score", deadline_s=1.0))
    pauses = [after - before for before, after in itertools.pairwise(sent)]
    assert len(pauses) >= 2
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(pauses))


def test_an_error_of_the_judge_is_not_asked_again() -> None:
    sent: list[int] = []

    async def refuses() -> float:
        sent.append(1)
        raise ValueError("no taste")

    with pytest.raises(ValueError, match="no taste"):
        asyncio.run(replicas.ask(refuses, who="the judge", asked="score", deadline_s=5.0))
    assert sent == [1]
