"""Deliveries to receivers that miss versions, refuse, fall silent or are slow; each is driven by itself.

The receivers stand for rollout actors: they hold a version, check what they are sent like a real one, and answer.
Real actors, frames and engines are in test_rollout.py and test_pool.py.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from actors.delivery import Delivery, WeightsAnswer, WeightsRefused
from contracts.events import Event
from contracts.records import WeightsUpdate
from contracts.waiting import NoAnswer


def update(version: int, base: int | None) -> WeightsUpdate:
    return WeightsUpdate(version, base, num_bytes=1000 if base is None else 10, digest="", dense_bytes=1000)


@dataclass
class Actor:
    """Takes what fits; `refuses` and `silent` are versions that it does not take or does not answer to."""

    version: int = 0
    actor_id: str = "rollout-0"
    node: str = "10.0.0.7"
    refuses: set[tuple[int, int | None]] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    slow_s: float = 0.0
    sent: list[tuple[int, int | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handle: Any = SimpleNamespace(load_weights=SimpleNamespace(remote=self._load))
        self._holds = self.version

    async def _load(self, update: WeightsUpdate, payload: list[Any], *, deadline_s: float) -> WeightsAnswer:
        assert payload == [update]
        self.sent.append((update.version, update.base_version))
        await asyncio.sleep(3600 if update.version in self.silent else self.slow_s)
        if (update.version, update.base_version) in self.refuses or update.base_version not in (None, self._holds):
            return WeightsAnswer(self._holds, 0.0, refused="it does not fit")
        self._holds = update.version
        return WeightsAnswer(self._holds, held_s=0.5 if update.base_version is None else 0.25)


class Learner:
    """Publishes one delta after the other, and keyframes of the last."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery, self.version, self.asked = delivery, 0, 0
        delivery.ask_keyframe = self.keyframe

    def publish(self) -> None:
        self.version += 1
        new = update(self.version, self.version - 1)
        self.delivery.publish(new, [new])  # type: ignore[list-item]

    async def keyframe(self) -> Any:
        self.asked += 1
        await asyncio.sleep(0.01)
        complete = update(self.version, None)
        return complete, [complete]


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scene

    asyncio.run(bounded())


def test_deltas_in_order_need_no_keyframe() -> None:
    async def scene() -> None:
        delivery, actor = Delivery(deadline_s=5), Actor()
        learner = Learner(delivery)
        said: list[Event] = []
        delivery.on_event = said.append
        for _ in range(3):
            learner.publish()
            await delivery.bring_up_to_date(actor)
        assert [(event.event, event.consequence[:16]) for event in said] == [
            ("rollover", f"serves version {version}") for version in (1, 2, 3)
        ]
        assert actor.sent == [(1, 0), (2, 1), (3, 2)]
        assert (actor.version, learner.asked) == (3, 0)
        assert delivery.take_costs() == {"generation_paused_s": 0.25, "broadcast_keyframe_bytes": 0}

    play(scene())


def test_late_joiners_share_one_keyframe() -> None:
    async def scene() -> None:
        delivery, late = Delivery(deadline_s=5), [Actor(), Actor(), Actor(version=2)]
        learner = Learner(delivery)
        for _ in range(3):
            learner.publish()
        await asyncio.gather(*(delivery.bring_up_to_date(actor) for actor in late))
        assert [actor.sent for actor in late] == [[(3, None)], [(3, None)], [(3, 2)]]
        assert {actor.version for actor in late} == {3}
        assert learner.asked == 1
        assert delivery.take_costs() == {"generation_paused_s": 0.5, "broadcast_keyframe_bytes": 2000}
        assert delivery.take_costs() == {"generation_paused_s": 0.0, "broadcast_keyframe_bytes": 0}

    play(scene())


def test_a_refused_delta_is_followed_by_a_keyframe_and_said() -> None:
    async def scene() -> None:
        delivery, actor = Delivery(deadline_s=5), Actor(refuses={(1, 0)})
        learner = Learner(delivery)
        said: list[Event] = []
        delivery.on_event = said.append
        learner.publish()
        await delivery.bring_up_to_date(actor)
        assert actor.sent == [(1, 0), (1, None)]
        assert actor.version == 1
        assert said == [
            Event("refusal", "rollout-0", "it does not fit", "is sent a keyframe"),
            Event("rollover", "rollout-0", "keyframe of 1000 bytes", "serves version 1, held requests for 0.50 s"),
        ]

    play(scene())


def test_who_refuses_complete_weights_is_given_up() -> None:
    async def scene() -> None:
        delivery, actor = Delivery(deadline_s=5), Actor(refuses={(1, 0), (1, None)})
        Learner(delivery).publish()
        with pytest.raises(WeightsRefused, match="rollout-0 refused complete weights: it does not fit"):
            await delivery.bring_up_to_date(actor)
        assert actor.version == 0

    play(scene())


def test_a_silent_receiver_is_named_and_holds_nobody_up() -> None:
    async def scene() -> None:
        delivery, silent, other = Delivery(deadline_s=0.2), Actor(silent={1}), Actor(actor_id="rollout-1")
        Learner(delivery).publish()
        waiting = asyncio.ensure_future(delivery.bring_up_to_date(silent))
        await delivery.bring_up_to_date(other)
        assert other.version == 1
        assert not waiting.done()
        with pytest.raises(NoAnswer, match=r"rollout actor rollout-0 on node 10\.0\.0\.7 .* take weights version 1"):
            await waiting
        assert silent.version == 0

    play(scene())


def test_versions_published_while_a_slow_receiver_takes_one_are_delivered_too() -> None:
    async def scene() -> None:
        delivery, slow = Delivery(deadline_s=5), Actor(slow_s=0.05)
        learner = Learner(delivery)
        learner.publish()
        waiting = asyncio.ensure_future(delivery.bring_up_to_date(slow))
        await asyncio.sleep(0.01)
        learner.publish()
        await waiting
        assert slow.sent == [(1, 0), (2, 1)]
        learner.publish()
        waiting = asyncio.ensure_future(delivery.bring_up_to_date(slow))
        await asyncio.sleep(0.01)
        learner.publish()
        learner.publish()
        await waiting
        assert slow.sent[2:] == [(3, 2), (5, None)]
        assert slow.version == 5

    play(scene())


def test_a_keyframe_newer_than_the_news_of_it_is_no_step_back() -> None:
    async def scene() -> None:
        delivery, late = Delivery(deadline_s=5), Actor(version=0)
        learner = Learner(delivery)
        learner.publish()
        learner.publish()
        learner.version = 3  # it has published, and the driver has yet to hear of it
        await delivery.bring_up_to_date(late)
        assert late.version == delivery.newest_version == 3
        learner.version = 2
        learner.publish()
        await delivery.bring_up_to_date(late)
        assert late.sent == [(3, None)]

    play(scene())


def test_a_keyframe_that_fails_is_asked_for_again() -> None:
    async def scene() -> None:
        delivery, late = Delivery(deadline_s=5), Actor()
        learner = Learner(delivery)
        for _ in range(2):
            learner.publish()

        async def fails() -> Any:
            raise RuntimeError("learner rank 0 died")

        delivery.ask_keyframe = fails
        with pytest.raises(RuntimeError, match="learner rank 0 died"):
            await delivery.bring_up_to_date(late)
        delivery.ask_keyframe = learner.keyframe
        await delivery.bring_up_to_date(late)
        assert late.version == 2

    play(scene())
