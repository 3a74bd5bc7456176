"""Placement groups of ranks in real Ray: together where one node has room, told of where none has, given back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from ray.util.placement_group import placement_group_table

from actors.placement import missing
from contracts.config import DeadlinesConfig, LearnerConfig
from contracts.events import Event
from contracts.waiting import NoAnswer
from learner.places import Places, one_node_has_room
from tests.command import Processes
from tests.conftest import RunCoroutine


async def said(asked: Mapping[str, float]) -> str:
    return await missing(asked, deadline_s=20.0)


def groups(state: str) -> list[dict[str, Any]]:
    return [each for each in placement_group_table().values() if each["state"] == state]


async def until_none(state: str) -> None:
    async with asyncio.timeout(20):
        while groups(state):  # noqa: ASYNC110 another process
            await asyncio.sleep(0.05)


def test_ranks_are_packed_on_one_node_and_their_places_are_given_back(
    ray_session: Processes, run: RunCoroutine
) -> None:
    async def reserved_and_given_back() -> list[Any]:
        places = Places(LearnerConfig(num_ranks=2, num_cpus=0.1), DeadlinesConfig(), who="the learner", missing=said)
        events: list[Event] = []
        await places.reserve(events.append)
        (group,) = groups("CREATED")
        strategies = [places.options(rank)["scheduling_strategy"] for rank in range(2)]
        places.give_back()
        await until_none("CREATED")
        assert places.options(0) == {}
        return [group["strategy"], group["bundles"], [each.placement_group_bundle_index for each in strategies], events]

    strategy, bundles, indexes, events = run(reserved_and_given_back())
    assert strategy == "STRICT_PACK"
    assert bundles == {0: {"CPU": 0.1}, 1: {"CPU": 0.1}}
    assert indexes == [0, 1]
    assert events == []


def test_what_no_node_has_is_named_after_place_s_and_nothing_stays_reserved(
    ray_session: Processes, run: RunCoroutine
) -> None:
    workers = LearnerConfig(num_ranks=2, num_cpus=0.1, resources={"learner": 1.0})
    deadlines = DeadlinesConfig(place_s=0.5, start_s=2.5)
    events: list[Event] = []

    async def wait_in_vain() -> None:
        places = Places(workers, deadlines, who="the learner", missing=said)
        words = r"^the learner waits for 0\.1 CPU on a node with resource learner; there is none: no node took it in"
        with pytest.raises(NoAnswer, match=words):
            await places.reserve(events.append)
        await until_none("PENDING")

    run(wait_in_vain())
    (event,) = events
    assert (event.event, event.who, event.consequence) == ("pending", "the learner", "the run waits for it")
    assert event.cause == "waits for 0.1 CPU on a node with resource learner; there is none; for each of its 2 ranks"
    assert groups("CREATED") == []


def test_a_cancelled_wait_gives_its_places_back(ray_session: Processes, run: RunCoroutine) -> None:
    async def cancelled() -> None:
        workers = LearnerConfig(num_cpus=0.1, resources={"learner": 1.0})
        places = Places(workers, DeadlinesConfig(), who="the learner", missing=said)
        waiting = asyncio.ensure_future(places.reserve(lambda event: None))
        async with asyncio.timeout(20):
            while not groups("PENDING"):  # noqa: ASYNC110 another process
                await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
        await until_none("PENDING")

    run(cancelled())


def test_ranks_that_reserve_nothing_need_no_group(ray_session: Processes, run: RunCoroutine) -> None:
    places = Places(LearnerConfig(num_cpus=0.0), DeadlinesConfig(), who="the learner", missing=said)
    run(places.reserve(lambda event: None))
    assert places.options(0) == {}


def test_one_node_has_room_for_as_many_as_are_free(ray_session: Processes) -> None:
    assert one_node_has_room({"CPU": 0.1}, 2)
    assert not one_node_has_room({"CPU": 0.1}, 10_000)
    assert not one_node_has_room({"CPU": 0.1, "learner": 1.0}, 1)
