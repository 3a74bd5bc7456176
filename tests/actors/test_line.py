"""The protocol between pool and actor through real Ray, with an actor whose engine does what the prompt says."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors import pool as pool_module
from actors.admission import BadRollout
from actors.pool import RolloutPool
from actors.worker import Worker, WorkerLost
from contracts.config import Config
from contracts.events import Event
from contracts.records import Rollout
from contracts.waiting import NoAnswer
from tests.actors.rollouts import ask, published, request, running_pool, with_settings
from tests.actors.scripted import SILENT_S, ScriptedActor, hang_core, silence_core, stop_process
from tests.command import Processes
from tests.conftest import RunCoroutine

SETTINGS: dict[str, dict[str, Any]] = {
    "rollout": {"max_deaths_in_a_row": 2},
    "deadlines": {"silent_s": SILENT_S, "lease_s": 3 * SILENT_S},
}


@pytest.fixture
def events() -> list[Event]:
    return []


@contextmanager
def scripted_pool(config: Config, run: RunCoroutine, events: list[Event], **options: Any) -> Iterator[RolloutPool]:
    with running_pool(with_settings(config, SETTINGS), run, actor_class=ScriptedActor, **options) as pool:
        pool.on_change = events.append
        yield pool


@pytest.fixture
def pool(
    ray_session: Processes,
    tiny_config: Config,
    run: RunCoroutine,
    events: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[RolloutPool]:
    monkeypatch.setattr(pool_module, "_FIRST_BACKOFF_S", 0.1)
    with scripted_pool(tiny_config, run, events) as pool:
        yield pool


def asked(pool: RolloutPool, *names: str, worker: Worker | None = None, deadline_s: float = 30) -> list[Any]:
    """Requests to one worker, all in one turn of the loop."""
    reserved = worker or pool.reserve(len(names))
    assert reserved is not None
    return [asyncio.ensure_future(pool.generate(reserved, request(name), deadline_s=deadline_s)) for name in names]


async def outcomes(requests: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*requests, return_exceptions=True))


async def until_asked(worker: Worker, number: int) -> None:
    while len(await ask(worker.handle, lambda actor: actor.asked)) < number:  # noqa: ASYNC110 another process
        await asyncio.sleep(0.01)


async def until_replaced(pool: RolloutPool, old: Worker) -> Worker:
    async with asyncio.timeout(60):
        while not pool.workers or pool.workers[0] is old:  # noqa: ASYNC110 another process
            await asyncio.sleep(0.01)
    return pool.workers[0]


def test_requests_of_one_turn_travel_in_one_call_and_answers_of_one_turn_in_another(
    pool: RolloutPool, run: RunCoroutine
) -> None:
    async def twice() -> tuple[list[Any], list[str]]:
        done = [*await outcomes(asked(pool, *(f"a{i}" for i in range(20))))]
        done += await outcomes(asked(pool, *(f"b{i}" for i in range(7))))
        return done, await ask(pool.workers[0].handle, lambda actor: actor.calls)

    done, calls = run(twice())
    assert [each.trajectory_id for each in done] == [f"a{i}" for i in range(20)] + [f"b{i}" for i in range(7)]
    assert calls == ["submit", "20 answers", "submit", "7 answers"]


def test_an_answer_overtakes_those_that_take_longer(pool: RolloutPool, run: RunCoroutine) -> None:
    async def race() -> None:
        held = asked(pool, "held-1", "held-2")
        await until_asked(pool.workers[0], 2)
        await outcomes(asked(pool, "quick"))
        assert not any(each.done() for each in held)
        await ask(pool.workers[0].handle, lambda actor: actor.calls.extend(["held-1", "held-2"]))
        assert [each.trajectory_id for each in await outcomes(held)] == ["held-1", "held-2"]

    run(race())


def test_answers_that_are_lost_on_their_way_come_again(pool: RolloutPool, run: RunCoroutine) -> None:
    async def lose() -> tuple[list[Any], list[str]]:
        await ask(pool.workers[0].handle, lambda actor: setattr(actor, "lose_next", True))
        done = await outcomes(asked(pool, "a", "b"))
        done += await outcomes(asked(pool, "c"))
        return done, await ask(pool.workers[0].handle, lambda actor: [*actor.asked, *actor.calls])

    done, said = run(lose())
    assert [each.trajectory_id for each in done] == ["a", "b", "c"]
    assert said == ["a", "b", "c", "submit", "2 answers", "submit", "1 answers"]


def test_what_nobody_waits_for_is_cancelled_in_the_engine(pool: RolloutPool, run: RunCoroutine) -> None:
    async def give_up() -> tuple[list[Any], list[str]]:
        worker = pool.workers[0]
        late = asked(pool, "held-late", deadline_s=0.5)
        dropped, kept = asked(pool, "held-dropped", "held-kept")
        await until_asked(worker, 3)
        dropped.cancel()
        done = await outcomes([*late, dropped])
        while len(await ask(worker.handle, lambda actor: actor.cancelled)) < 2:  # noqa: ASYNC110 another process
            await asyncio.sleep(0.01)
        assert not kept.done()
        await ask(worker.handle, lambda actor: actor.calls.append("held-kept"))
        return [*done, await kept], await ask(worker.handle, lambda actor: actor.cancelled)

    (late, dropped, kept), cancelled = run(give_up())
    assert isinstance(late, NoAnswer)
    assert "finish response held-late" in str(late)
    assert isinstance(dropped, asyncio.CancelledError)
    assert kept.trajectory_id == "held-kept"
    assert sorted(cancelled) == ["held-dropped", "held-late"]


def test_a_refused_request_and_a_failed_one_are_told_apart(pool: RolloutPool, run: RunCoroutine) -> None:
    async def all_three() -> list[Any]:
        return await outcomes(asked(pool, "refused", "fails", "good"))

    refused, failed, good = run(all_three())
    assert isinstance(refused, BadRollout)
    assert str(refused) == "rollout-0: too long a prompt"
    assert type(failed) is RuntimeError
    assert "KeyError: 'a bug of the actor'" in str(failed)
    assert "in generate" in str(failed)
    assert good.trajectory_id == "good"


@pytest.mark.parametrize(
    ("silence", "cause"),
    [
        (stop_process, "silent: rollout actor rollout-0 on node 127.0.0.1 did not answer within "),
        (silence_core, "silent: the engine core of rollout actor rollout-0 on node 127.0.0.1 has not answered for 2.5"),
        (hang_core, "silent: the engine core of rollout actor rollout-0 on node 127.0.0.1 has not answered for 6.5"),
    ],
)
def test_a_silent_worker_is_killed_and_replaced(
    pool: RolloutPool, run: RunCoroutine, events: list[Event], silence: Any, cause: str
) -> None:
    async def fall_silent() -> tuple[list[Any], int, Worker]:
        worker = pool.workers[0]
        pid: int = await ask(worker.handle, lambda actor: os.getpid())
        held = asked(pool, "held-1", "held-2")
        await until_asked(worker, 2)
        call = worker.handle.__ray_call__.remote(silence)
        done = await outcomes(held)
        del call
        return done, pid, await until_replaced(pool, worker)

    done, pid, other = run(fall_silent())
    assert {type(each) for each in done} == {WorkerLost}
    death, restart = events
    assert (death.event, death.who, death.node) == ("death", "rollout-0", "127.0.0.1")
    assert death.cause.startswith(cause)
    assert restart == Event("restart", other.actor_id, "rollout-0 was lost", "serves version 0", "127.0.0.1")
    expires = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < expires
        time.sleep(0.05)


@pytest.mark.parametrize("whole_node", [False, True])
def test_a_drained_worker_finishes_what_it_can_and_hands_the_rest_back(
    pool: RolloutPool, run: RunCoroutine, events: list[Event], whole_node: bool
) -> None:
    async def drain() -> tuple[list[Any], float, Worker]:
        worker = pool.workers[0]
        held = asked(pool, "held-1", "held-2", "held-3")
        await until_asked(worker, 3)
        began = time.monotonic()
        if whole_node:
            node_id = ray.get_runtime_context().get_node_id()
            drained = asyncio.ensure_future(pool.drain_node(node_id, "it is preempted", 1.0))
        else:
            drained = asyncio.ensure_future(pool.drain(worker, cause="it is preempted", deadline_s=1.0))
        await asyncio.sleep(0.01)
        assert pool.workers == ()
        await ask(worker.handle, lambda actor: actor.calls.append("held-2"))
        done = await outcomes(held)
        lost_after_s = time.monotonic() - began
        await drained
        if whole_node:  # it is the only one, so whatever is started comes up there again
            async with asyncio.timeout(60):
                while not any(event.event == "start_failed" for event in events):  # noqa: ASYNC110 another process
                    await asyncio.sleep(0.01)
            return done, lost_after_s, worker
        other = await until_replaced(pool, worker)
        done += await outcomes(asked(pool, "next"))
        return done, lost_after_s, other

    done, lost_after_s, other = run(drain())
    assert [type(each) for each in done[:3]] == [WorkerLost, Rollout, WorkerLost]
    assert str(done[0]) == "rollout actor rollout-0 had to leave: it is preempted"
    assert 1.0 <= lost_after_s < 10
    begun, left = [event for event in events if event.event == "drain"]
    assert (begun.who, begun.cause, begun.node) == ("rollout-0", "it is preempted", "127.0.0.1")
    assert begun.consequence == "gets no new requests, 3 running ones have 1 s; another is started"
    assert left.consequence == "stopped; 1 requests were finished, 2 go to others"
    if whole_node:
        assert [event.cause for event in events if event.event in ("start_failed", "restart")][:1] == [
            "rollout actor rollout-1 came up on node 127.0.0.1, which is being drained"
        ]
    else:
        (restart,) = [event for event in events if event.event == "restart"]
        assert restart == Event("restart", other.actor_id, "rollout-0 had to leave", "serves version 0", "127.0.0.1")
        assert done[3].actor_id == other.actor_id


def test_a_drained_worker_that_is_done_leaves_at_once(pool: RolloutPool, run: RunCoroutine) -> None:
    async def drain() -> float:
        began = time.monotonic()
        await pool.drain(pool.workers[0], cause="too many", deadline_s=60)
        return time.monotonic() - began

    assert run(drain()) < 30


def test_a_worker_that_dies_while_it_is_drained_is_replaced_once(
    pool: RolloutPool, run: RunCoroutine, events: list[Event]
) -> None:
    async def drain_and_kill() -> list[Any]:
        worker = pool.workers[0]
        held = asked(pool, "held")
        await until_asked(worker, 1)
        drained = asyncio.ensure_future(pool.drain(worker, cause="it is preempted", deadline_s=60))
        await asyncio.sleep(0.1)
        ray.kill(worker.handle)
        done = await outcomes(held)
        await drained
        await until_replaced(pool, worker)
        await asyncio.sleep(0.5)
        return done

    (lost,) = run(drain_and_kill())
    assert isinstance(lost, WorkerLost)
    assert sorted(event.event for event in events) == ["death", "drain", "restart"]
    (death,) = [event for event in events if event.event == "death"]
    assert death.consequence == "it had to leave anyway; its requests go to others"


def test_workers_that_break_again_and_again_stop_the_pool_with_their_own_words(
    pool: RolloutPool, run: RunCoroutine, events: list[Event]
) -> None:
    async def break_each() -> None:
        while not pool.failure.done():
            if pool.workers:
                (lost,) = await outcomes(asked(pool, "breaks"))
                assert isinstance(lost, WorkerLost)
            await asyncio.sleep(0.01)
        pool.failure.result()

    own = r"rollout actors died 3 times in a row; the last error: its core died: segmentation fault in layer 7"
    with pytest.raises(RuntimeError, match=own):
        run(break_each())
    deaths = [event for event in events if event.event == "death"]
    assert [death.who for death in deaths] == ["rollout-0", "rollout-1", "rollout-2"]
    assert deaths[-1].consequence == "none is started any more"


def test_a_response_in_between_ends_the_count_of_deaths(pool: RolloutPool, run: RunCoroutine) -> None:
    async def break_four_times() -> None:
        for _ in range(4):
            async with asyncio.timeout(60):
                while not pool.workers:  # noqa: ASYNC110 another process
                    await asyncio.sleep(0.01)
            good, lost = [*await outcomes(asked(pool, "good")), *await outcomes(asked(pool, "breaks"))]
            assert isinstance(good, Rollout)
            assert isinstance(lost, WorkerLost)
        assert not pool.failure.done()

    run(break_four_times())


def test_who_comes_after_a_publication_starts_from_the_base_model_and_is_brought_up(
    ray_session: Processes,
    tiny_config: Config,
    run: RunCoroutine,
    events: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resumed run starts from a checkpoint, which is removed when there are newer ones."""
    monkeypatch.setattr(pool_module, "_FIRST_BACKOFF_S", 0.1)
    update, payload = published(Path(tiny_config.model.path), 8)

    async def break_and_replace(pool: RolloutPool) -> list[tuple[str, int]]:
        began = [await ask(pool.workers[0].handle, lambda actor: actor.began_with)]
        for publishes in (False, True):
            if publishes:
                pool.publish(update, payload)
            worker = pool.workers[0]
            await outcomes(asked(pool, "breaks"))
            worker = await until_replaced(pool, worker)
            began.append(await ask(worker.handle, lambda actor: actor.began_with))
        assert worker.version == 8
        return began

    options = {"path": "checkpoint", "version": 7, "base_path": tiny_config.model.path}
    monkeypatch.setattr(pool_module, "_vocabulary_of", lambda path: 320)
    with scripted_pool(tiny_config, run, events, **options) as pool:
        began = run(break_and_replace(pool))
    assert began == [("checkpoint", 7), ("checkpoint", 7), (tiny_config.model.path, 0)]
