"""Rollout actors that die: their requests fail at once, and a replacement serves the newest weights or nothing."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import pool as pool_module
from actors.pool import RolloutPool, Worker, WorkerLost
from contracts.config import Config
from contracts.events import Event
from contracts.records import Rollout
from tests.actors.direct import response_logprobs
from tests.actors.rollouts import MAX_LOGPROB_ERROR, PROMPT, ask, published, request, running_pool
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.tiny import build_tiny_model

REPLACED_S = 180.0


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
    with running_pool(tiny_config, run, max_deaths_in_a_row=2) as pool:
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


async def kill_while_generating(pool: RolloutPool, worker: Worker, whose: Any) -> tuple[list[Any], list[int]]:
    """What 16 requests came to when a process of their worker was killed; (outcomes, the worker's processes)."""
    pids = [await ask(worker.handle, question) for question in (actor_process, engine_core_process)]
    victim = await ask(worker.handle, whose)
    assert pool.reserve(16) is worker
    requests = [
        asyncio.ensure_future(pool.generate(worker, request(f"lost-{i}", seed=i), deadline_s=120)) for i in range(16)
    ]
    while not await ask(worker.handle, lambda actor: actor._engine.num_running()):  # noqa: ASYNC110 another process
        await asyncio.sleep(0.01)
    os.kill(victim, signal.SIGKILL)
    return list(await asyncio.gather(*requests, return_exceptions=True)), pids


async def replacement(pool: RolloutPool) -> Worker:
    async with asyncio.timeout(REPLACED_S):
        while not pool.workers:
            assert not pool.failure.done(), pool.failure
            await asyncio.sleep(0.05)
    return pool.workers[0]


async def gone(pids: list[int]) -> None:
    async with asyncio.timeout(60):
        while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("whose", [actor_process, pytest.param(engine_core_process, marks=pytest.mark.slow)])
def test_a_worker_that_dies_is_replaced_by_one_with_the_newest_weights(
    pool: RolloutPool, newest_model: Path, run: RunCoroutine, events: list[Event], whose: Any
) -> None:
    async def kill_and_go_on() -> tuple[list[Any], list[int], Rollout]:
        outcomes, pids = await kill_while_generating(pool, worker, whose)
        assert worker not in pool.workers
        # Asked at once, answered by the replacement.
        rollout = await pool.generate_somewhere(request("next", max_tokens=40), deadline_s=REPLACED_S)
        return outcomes, pids, rollout

    worker = pool.workers[0]
    events.clear()
    outcomes, pids, rollout = run(kill_and_go_on(), timeout_s=2 * REPLACED_S)
    lost = [outcome for outcome in outcomes if not isinstance(outcome, Rollout)]
    assert lost
    assert {type(outcome) for outcome in lost} == {WorkerLost}
    assert worker.actor_id in str(lost[0])
    death, rollover, restart = events
    assert (death.event, death.who, death.node) == ("death", worker.actor_id, "127.0.0.1")
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
    run(gone(pids))


def test_a_crash_loop_ends_with_the_actors_own_error(
    pool: RolloutPool, run: RunCoroutine, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last: this pool starts nothing any more."""

    async def kill_for_good() -> None:
        os.kill(await ask(pool.workers[0].handle, actor_process), signal.SIGKILL)
        # A pool that has failed says so to whoever asks it for a response.
        await pool.generate_somewhere(request("never"), deadline_s=REPLACED_S)

    monkeypatch.setattr(pool_module, "_FIRST_BACKOFF_S", 0.1)
    monkeypatch.setattr(pool, "_path", "/nowhere/model")
    events.clear()
    with pytest.raises(
        RuntimeError, match=r"rollout actors died 3 times in a row; the last error.*(?s:.*)/nowhere/model"
    ):
        run(kill_for_good(), timeout_s=2 * REPLACED_S)
    assert [event.event for event in events] == ["death", "start_failed", "start_failed"]
    assert all(event.cause for event in events)
    assert pool.workers == ()
