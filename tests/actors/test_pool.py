"""Rollout actors that die: their requests fail at once, and a replacement serves the newest weights or nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import pool as pool_module
from actors.pool import RolloutPool
from actors.worker import Worker, WorkerLost
from contracts.config import Config
from contracts.events import Event
from contracts.records import Rollout
from tests.actors.direct import response_logprobs
from tests.actors.rollouts import MAX_LOGPROB_ERROR, PROMPT, ask, published, request, running_pool, with_settings
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.tiny import build_tiny_model

REPLACED_S = 180.0
SILENT_S = 8.0  # others may keep the cores busy


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def newest_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "newest", tied=True, seed=2)


@pytest.fixture(scope="module")
def pool(
    ray_session: Processes, tiny_config: Config, newest_model: Path, run: RunCoroutine, events: list[Event]
) -> Iterator[RolloutPool]:
    """One worker that started with version 0 and has taken version 5."""
    settings: dict[str, dict[str, Any]] = {"rollout": {"max_deaths_in_a_row": 2}, "deadlines": {"silent_s": SILENT_S}}
    with running_pool(with_settings(tiny_config, settings), run) as pool:
        pool.on_change = events.append

        update, payload = published(newest_model, 5)

        async def keyframe() -> Any:
            return update, payload

        async def publish() -> None:
            updated = asyncio.Event()
            pool.on_update = updated.set
            pool.keyframes_from(keyframe)
            pool.publish(update, payload)
            await asyncio.wait_for(updated.wait(), 60)

        run(publish())
        assert [worker.version for worker in pool.workers] == [5]
        assert pool.take_delivery_costs()["generation_paused_s"] > 0
        yield pool


def actor_process(actor: Any) -> int:
    return os.getpid()


def engine_core_process(actor: Any) -> int:
    pid: int = actor._engine._llm.engine_core.resources.engine_manager.processes[0].pid
    return pid


@dataclass
class Remains:
    """What must be gone with a worker: its processes, and the named segments of shared memory that they hold."""

    pids: list[int]
    segments: set[Path]

    @classmethod
    async def of(cls, worker: Worker) -> Remains:
        pids = [await ask(worker.handle, question) for question in (actor_process, engine_core_process)]
        mapped = {Path(each.path) for pid in pids for each in psutil.Process(pid).memory_maps()}
        return cls(pids, {path for path in mapped if path.parent == Path("/dev/shm") and path.exists()})

    async def gone(self) -> None:
        async with asyncio.timeout(60):
            while any(_runs(pid) for pid in self.pids):  # noqa: ASYNC110 other processes
                await asyncio.sleep(0.1)
        assert not [segment for segment in self.segments if segment.exists()]


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def strike_while_generating(
    pool: RolloutPool, worker: Worker, whose: Any, what: signal.Signals
) -> tuple[list[Any], Remains]:
    """What 16 requests came to when a process of their worker got a signal."""
    remains, victim = await Remains.of(worker), await ask(worker.handle, whose)
    requests: list[Any] = await generating(pool, worker, 16)
    os.kill(victim, what)
    return list(await asyncio.gather(*requests, return_exceptions=True)), remains


async def generating(pool: RolloutPool, worker: Worker, number: int) -> list[Any]:
    """So many requests to a worker, which has begun with them."""
    assert pool.reserve(number) is worker
    requests = [
        asyncio.ensure_future(pool.generate(worker, request(f"running-{i}", seed=i), deadline_s=120))
        for i in range(number)
    ]
    while not await ask(worker.handle, lambda actor: actor._engine.num_running()):  # noqa: ASYNC110 another process
        await asyncio.sleep(0.01)
    return requests


async def replacement(pool: RolloutPool) -> Worker:
    async with asyncio.timeout(REPLACED_S):
        while not pool.workers:
            assert not pool.failure.done(), pool.failure
            await asyncio.sleep(0.05)
    return pool.workers[0]


STRIKES = [
    pytest.param(actor_process, signal.SIGKILL, r"The actor died .*", id="actor-killed"),
    pytest.param(
        engine_core_process, signal.SIGKILL, r"its core died: .*", id="engine-core-killed", marks=pytest.mark.slow
    ),
    pytest.param(
        actor_process,
        signal.SIGSTOP,
        r"silent: rollout actor rollout-\d+ on node 127\.0\.0\.1 did not answer within .* s, asked .* s ago to .*",
        id="actor-stopped",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        engine_core_process,
        signal.SIGSTOP,
        r"silent: the engine core of rollout actor rollout-\d+ on node 127\.0\.0\.1 has not answered for .* s; "
        r"its process has stood still for .* s",
        id="engine-core-stopped",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("whose", "what", "cause"), STRIKES)
def test_a_worker_that_dies_or_falls_silent_is_replaced_by_one_with_the_newest_weights(
    pool: RolloutPool,
    newest_model: Path,
    run: RunCoroutine,
    events: list[Event],
    whose: Any,
    what: signal.Signals,
    cause: str,
) -> None:
    async def strike_and_go_on() -> tuple[list[Any], Remains, Rollout]:
        outcomes, remains = await strike_while_generating(pool, worker, whose, what)
        assert worker not in pool.workers
        # Asked at once, answered by the replacement.
        rollout = await pool.generate_somewhere(request("next", max_tokens=40), deadline_s=REPLACED_S)
        return outcomes, remains, rollout

    worker = pool.workers[0]
    events.clear()
    outcomes, remains, rollout = run(strike_and_go_on(), timeout_s=2 * REPLACED_S)
    lost = [outcome for outcome in outcomes if not isinstance(outcome, Rollout)]
    assert lost
    assert {type(outcome) for outcome in lost} == {WorkerLost}
    assert worker.actor_id in str(lost[0])
    death, rollover, restart = events
    assert (death.event, death.who, death.node) == ("death", worker.actor_id, "127.0.0.1")
    assert re.fullmatch(cause, death.cause)
    assert death.consequence == "its requests go to others, another is started"
    assert (rollover.event, rollover.who) == ("rollover", pool.workers[0].actor_id)
    assert rollover.cause.startswith("keyframe of ")
    assert restart == Event(
        "restart", pool.workers[0].actor_id, f"{worker.actor_id} was lost", "serves version 5", "127.0.0.1"
    )
    assert pool.workers[0].actor_id == rollout.actor_id != worker.actor_id
    assert set(rollout.weights_versions) == {5}
    expected = response_logprobs(newest_model, PROMPT, rollout.response_tokens, temperature=1.0)
    assert max(abs(a - b) for a, b in zip(rollout.behavior_logprobs, expected, strict=True)) < MAX_LOGPROB_ERROR
    run(remains.gone())


@pytest.mark.slow
def test_a_worker_that_is_drained_finishes_what_it_can_and_hands_the_rest_back(
    pool: RolloutPool, run: RunCoroutine, events: list[Event]
) -> None:
    async def drain_while_generating() -> tuple[list[Any], Remains, float]:
        remains = await Remains.of(worker)
        requests = await generating(pool, worker, 16)
        # Stopped for longer than the deadline, the engine cannot finish what it has left.
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        os.kill(remains.pids[1], signal.SIGSTOP)
        began = time.monotonic()
        drained = asyncio.ensure_future(pool.drain(worker, cause="its machine is needed", deadline_s=2))
        await asyncio.sleep(0)
        assert worker not in pool.workers
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        lost_after_s = time.monotonic() - began
        os.kill(remains.pids[1], signal.SIGCONT)
        await drained
        await replacement(pool)
        return list(outcomes), remains, lost_after_s

    worker = pool.workers[0]
    events.clear()
    outcomes, remains, lost_after_s = run(drain_while_generating(), timeout_s=2 * REPLACED_S)
    lost = [outcome for outcome in outcomes if isinstance(outcome, WorkerLost)]
    finished = [outcome for outcome in outcomes if isinstance(outcome, Rollout)]
    assert lost
    assert finished
    assert len(lost) + len(finished) == 16
    assert 2 <= lost_after_s < 10
    begun, left = [event for event in events if event.event == "drain"]
    assert begun.cause == left.cause == "its machine is needed"
    assert begun.consequence.endswith("running ones have 2 s; another is started")
    assert left.consequence.startswith("stopped; ")
    assert left.consequence.endswith(f" {len(lost)} go to others")
    (restart,) = [event for event in events if event.event == "restart"]
    assert restart.cause == f"{worker.actor_id} had to leave"
    run(remains.gone())


@pytest.mark.slow
def test_a_crash_loop_ends_with_the_actors_own_error(
    pool: RolloutPool, run: RunCoroutine, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last: this pool starts nothing any more."""

    async def kill_for_good() -> None:
        os.kill(await ask(pool.workers[0].handle, actor_process), signal.SIGKILL)
        # A pool that has failed says so to whoever asks it for a response.
        await pool.generate_somewhere(request("never"), deadline_s=REPLACED_S)

    monkeypatch.setattr(pool_module, "_FIRST_BACKOFF_S", 0.1)
    monkeypatch.setattr(pool._starter, "_path", "/nowhere/model")
    events.clear()
    own = r"rollout actors died 3 times in a row; the last error: .*rollout\.py\", line \d+, in start\n.*/nowhere/model"
    with pytest.raises(RuntimeError, match=f"(?s){own}"):
        run(kill_for_good(), timeout_s=2 * REPLACED_S)
    assert [event.event for event in events] == ["death", "start_failed", "start_failed"]
    assert all(event.cause for event in events)
    assert pool.workers == ()
