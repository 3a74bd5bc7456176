"""Workers that come and go through real Ray, with an actor whose engine does what a request's name says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from actors.placement import Cluster, Room, waits_for
from actors.pool import RolloutPool
from actors.worker import WorkerLost
from contracts.config import Config
from contracts.events import Event
from contracts.records import Rollout
from contracts.waiting import NoAnswer
from contracts.workers import AutoscaleConfig
from tests.actors.rollouts import ask, request, running_pool, with_settings
from tests.actors.scripted import ScriptedActor
from tests.command import Processes
from tests.conftest import RunCoroutine

NOWHERE = {"rollout": 1.0}  # no node of the session's Ray has this resource


@contextmanager
def pool_of(config: Config, run: RunCoroutine, events: list[Event], **settings: Any) -> Iterator[RolloutPool]:
    rollout = {"num_workers": 1, "autoscale": AutoscaleConfig(max_workers=4), "max_concurrent": 4}
    deadlines = {"place_s": 0.5, "lease_s": 20.0} | settings.pop("deadlines", {})
    changed = with_settings(config, {"rollout": rollout | settings, "deadlines": deadlines})
    with running_pool(changed, run, actor_class=ScriptedActor) as pool:
        pool.on_change = events.append
        yield pool


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110 other processes
            await asyncio.sleep(0.01)


def test_the_pool_grows_and_shrinks_while_requests_run_and_none_of_them_is_lost(
    ray_session: Processes, tiny_config: Config, run: RunCoroutine
) -> None:
    async def grow_and_shrink(pool: RolloutPool) -> list[Any]:
        pool.resize(3, cause="the learner waits")
        assert pool.counts()[:3] == (3, 1, 2)
        await until(lambda: pool.counts().running == 3)
        assert sorted(worker.index for worker in pool.workers) == [0, 1, 2]
        requests = []
        for number in range(6):
            worker = pool.reserve(1)
            assert worker is not None
            held = request(f"held-{number}")
            requests.append((worker, asyncio.ensure_future(pool.generate(worker, held, deadline_s=60))))
        busiest = pool.reserve(1)  # the one that holds most stays
        assert busiest is not None
        pool.resize(1, cause="places are free")
        await until(lambda: pool.counts().draining == 2)
        assert pool.workers == (busiest,)
        assert pool.counts().wanted == 1
        for number, (worker, _) in enumerate(requests):
            await ask(worker.handle, _let_go(f"held-{number}"))
        outcomes = await asyncio.gather(*(asked for _, asked in requests), return_exceptions=True)
        await until(lambda: pool.counts().draining == 0)
        return list(outcomes)

    events: list[Event] = []
    with pool_of(tiny_config, run, events) as pool:
        outcomes = run(grow_and_shrink(pool))
    assert [outcome.trajectory_id for outcome in outcomes] == [f"held-{number}" for number in range(6)]
    scales = [(event.cause, event.consequence) for event in events if event.event == "scale"]
    assert scales == [("the learner waits", "1 -> 3 are wanted"), ("places are free", "3 -> 1 are wanted")]
    told = [event.consequence for event in events if event.event == "drain"]
    begun = "gets no new requests, 2 running ones have 20 s; none is started in its place"
    assert sorted(told) == sorted([begun, begun, *["stopped; 2 requests were finished, 0 go to others"] * 2])
    assert not [event for event in events if event.event in ("death", "restart", "killed")]


def _let_go(name: str) -> Callable[[Any], None]:
    return lambda actor: actor.calls.append(name)


def test_what_a_leaving_worker_cannot_finish_in_time_is_handed_back(
    ray_session: Processes, tiny_config: Config, run: RunCoroutine
) -> None:
    async def shrink(pool: RolloutPool) -> tuple[Any, Any]:
        pool.resize(2, cause="more")
        await until(lambda: pool.counts().running == 2)
        first, second = pool.reserve(2), pool.reserve(1)
        assert first is not None
        assert second is not None
        stays, stays_too, leaves = (
            asyncio.ensure_future(pool.generate(worker, request(name), deadline_s=60))
            for worker, name in ((first, "held-a"), (first, "b"), (second, "held-c"))
        )
        pool.resize(1, cause="fewer")
        (lost,) = await asyncio.gather(leaves, return_exceptions=True)
        await ask(first.handle, _let_go("held-a"))
        await stays_too
        return lost, await stays

    with pool_of(tiny_config, run, [], deadlines={"lease_s": 1.0}) as pool:
        lost, stayed = run(shrink(pool))
    assert isinstance(lost, WorkerLost)
    assert isinstance(stayed, Rollout)


def test_a_worker_that_no_node_has_room_for_is_told_of_and_the_others_go_on(
    ray_session: Processes, tiny_config: Config, run: RunCoroutine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait_in_vain(pool: RolloutPool) -> None:
        starter = pool._starter
        monkeypatch.setattr(starter, "_config", starter._config.model_copy(update={"resources": NOWHERE}))
        pool.resize(2, cause="more")
        await until(lambda: [event for event in events if event.event == "pending"])
        await asyncio.sleep(1.5)  # past start_s: it waits on, and is told of once
        assert pool.counts() == (2, 1, 1, 1, 0)
        assert (await pool.generate_somewhere(request("meanwhile"), deadline_s=20)).trajectory_id == "meanwhile"
        pool.resize(1, cause="fewer")
        assert pool.counts() == (1, 1, 0, 0, 0)

    events: list[Event] = []
    # The worker that is there starts in time: the deadline is lowered afterwards.
    with pool_of(tiny_config, run, events) as pool:
        starter = pool._starter
        monkeypatch.setattr(starter, "_deadlines", starter._deadlines.model_copy(update={"start_s": 1.0}))
        run(wait_in_vain(pool))
    (pending,) = [event for event in events if event.event == "pending"]
    assert pending.who == "rollout actor rollout-1"
    assert pending.cause == "waits for 0.1 CPU on a node with resource rollout; there is none"
    assert pending.consequence == "1 others work"
    assert not [event for event in events if event.event in ("start_failed", "drain")]


def test_a_run_whose_first_worker_has_no_node_ends_with_what_is_missing(
    ray_session: Processes, tiny_config: Config, run: RunCoroutine
) -> None:
    missing = (
        r"^rollout actor rollout-0 waits for 0\.1 CPU on a node with resource rollout; there is none: no node took it"
    )
    with (
        pytest.raises(NoAnswer, match=missing),
        pool_of(tiny_config, run, [], resources=NOWHERE, deadlines={"start_s": 1.0}),
    ):
        pass


GPU = {"GPU": 1.0, "CPU": 1.0, "rollout": 1.0}
FULL = Room({"CPU": 8.0, "GPU": 2.0, "rollout": 4.0}, {"CPU": 8.0, "rollout": 2.0})


@pytest.mark.parametrize(
    ("asked", "rooms", "may_start", "words"),
    [
        (GPU, [FULL, FULL], {}, "waits for 1 GPU on a node with resource rollout; none free, limit 4"),
        (GPU, [FULL], {"GPU": 6.0}, "waits for 1 GPU on a node with resource rollout; none free, limit 6"),
        (
            GPU,
            [Room({"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0})],
            {},
            "waits for 1 CPU, 1 GPU on a node with resource rollout; there is none",
        ),
        (
            GPU,
            [],
            {"rollout": 3.0},
            "waits for 1 CPU, 1 GPU on a node with resource rollout; none is up, the autoscaler may start up to 3 "
            "rollout",
        ),
        (
            {"CPU": 2.0, "rollout": 1.0},
            [Room({"CPU": 8.0, "rollout": 1.0}, {"CPU": 8.0})],
            {},
            "waits for 1 of resource rollout on a node; none free, limit 1",
        ),
        ({"CPU": 2.0}, [Room({"CPU": 8.0}, {"CPU": 0.5})], {}, "waits for 2 CPU on a node; 0.5 free, limit 8"),
        (
            {"CPU": 2.0, "GPU": 0.1},
            [Room({"CPU": 2.0, "GPU": 1.0}, {"GPU": 0.1}), Room({"CPU": 2.0}, {"CPU": 2.0})],
            {},
            "waits for 2 CPU, 0.1 GPU on a node; 2 CPU, 0.1 GPU free, limit 4 CPU, 1 GPU",
        ),
    ],
)
def test_what_is_missing_in_words(
    asked: dict[str, float], rooms: list[Room], may_start: dict[str, float], words: str
) -> None:
    assert waits_for(asked, Cluster(rooms, may_start=may_start)) == words


FOUR = {"CPU": 1.0, "GPU": 4.0}
TWO = Room({"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0})


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        (Cluster([TWO, TWO]), "waits for 4 GPU on one node; no node is that large: 2 GPU at most"),
        (
            Cluster([TWO, Room({"CPU": 0.5, "GPU": 4.0}, {})]),
            "waits for 4 GPU on one node; no node is that large: 8 CPU, 4 GPU at most",
        ),
        (
            Cluster([TWO, TWO], kinds=[{"CPU": 4.0, "GPU": 4.0}], may_start={"CPU": 8.0, "GPU": 8.0}),
            "waits for 4 GPU on a node; 2 free, limit 8",
        ),
    ],
)
def test_a_worker_that_is_too_large_for_any_node_is_told_so(cluster: Cluster, words: str) -> None:
    assert waits_for(FOUR, cluster) == words
