"""Who may begin while weights are exchanged, and what becomes of those that run: no Ray, no engine."""

import asyncio

import pytest

from serving import rollover
from serving.rollover import DrainError, Gate


class Replica:
    """A version, and answers that note under which versions they were written, step by step."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.version = 1
        self.answers: list[set[int]] = []
        self.sent_away = 0
        self.ended = 0

    async def answer(self, steps: int, *, wait_s: float = 5.0, stubborn: bool = False) -> None:
        stop = asyncio.Event()

        async def end() -> None:
            self.ended += 1
            if not stubborn:
                stop.set()

        if not await self.gate.opened(wait_s=wait_s):
            self.sent_away += 1
            return
        with self.gate.enter(end):
            written = {self.version}
            for _ in range(steps):
                if stop.is_set():
                    break
                await asyncio.sleep(0.001)
                written.add(self.version)
            self.answers.append(written)

    async def take(self, version: int, *, alone: bool, drain_s: float = 5.0, takes_s: float = 0.01) -> int:
        async with self.gate.drained(alone=alone, drain_s=drain_s) as ended:
            assert self.gate.num_running == 0
            await asyncio.sleep(takes_s)
            self.version = version
        return ended


@pytest.fixture(autouse=True)
def short_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollover, "_ENDING_S", 0.1)


async def test_each_answer_is_of_one_version_while_versions_roll_over() -> None:
    replica = Replica()

    async def ask() -> None:
        for steps in range(1, 30):
            await replica.answer(steps)

    asking = [asyncio.create_task(ask()) for _ in range(8)]
    for version in range(2, 8):
        await asyncio.sleep(0.02)
        assert await replica.take(version, alone=True) == 0
    await asyncio.gather(*asking)
    assert len(replica.answers) == 8 * 29
    assert all(len(written) == 1 for written in replica.answers)
    assert len({next(iter(written)) for written in replica.answers}) > 3


async def test_requests_go_elsewhere_where_another_replica_serves_and_wait_where_none_does() -> None:
    replica = Replica()
    running = asyncio.create_task(replica.answer(20))
    await asyncio.sleep(0.005)
    taking = asyncio.create_task(replica.take(2, alone=False))
    await asyncio.sleep(0.001)
    await replica.answer(1)
    assert (replica.sent_away, replica.version) == (1, 1)
    await asyncio.gather(running, taking)

    taking = asyncio.create_task(replica.take(3, alone=True))
    await asyncio.sleep(0.001)
    await replica.answer(1)
    assert replica.sent_away == 1
    assert replica.answers == [{1}, {3}]
    await taking


async def test_one_that_waited_is_sent_away_when_the_next_drain_is_not_alone() -> None:
    replica = Replica()
    taking = asyncio.create_task(replica.take(2, alone=True, takes_s=0.02))
    await asyncio.sleep(0.001)
    waiting = asyncio.create_task(replica.answer(1))
    await taking
    async with replica.gate.drained(alone=False, drain_s=1.0):
        await waiting
    assert replica.sent_away + len(replica.answers) == 1
    assert all(len(written) == 1 for written in replica.answers)


async def test_nobody_waits_for_longer_than_asked() -> None:
    replica = Replica()
    taking = asyncio.create_task(replica.take(2, alone=True, takes_s=0.2))
    await asyncio.sleep(0.001)
    with pytest.raises(TimeoutError):
        await replica.answer(1, wait_s=0.02)
    assert not taking.done()
    await taking


async def test_answers_that_outlast_the_drain_are_ended() -> None:
    replica = Replica()
    running = [asyncio.create_task(replica.answer(10_000)) for _ in range(3)]
    await asyncio.sleep(0.005)
    assert await replica.take(2, alone=True, drain_s=0.02) == 3
    await asyncio.gather(*running)
    assert replica.answers == [{1}] * 3
    assert replica.ended == 3


async def test_answers_that_cannot_be_ended_keep_their_weights() -> None:
    replica = Replica()
    running = asyncio.create_task(replica.answer(400, stubborn=True))
    await asyncio.sleep(0.005)
    with pytest.raises(DrainError, match="1 answers run on"):
        await replica.take(2, alone=True, drain_s=0.02)
    await replica.answer(1)
    await running
    assert replica.answers == [{1}, {1}]


async def test_the_gate_opens_again_when_the_exchange_fails_or_is_cancelled() -> None:
    replica = Replica()
    with pytest.raises(RuntimeError, match="refused"):
        async with replica.gate.drained(alone=False, drain_s=1.0):
            raise RuntimeError("refused")
    running = asyncio.create_task(replica.answer(50))
    await asyncio.sleep(0.005)
    taking = asyncio.create_task(replica.take(2, alone=False))
    await asyncio.sleep(0.005)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    await replica.answer(1)
    await running
    assert replica.sent_away == 0
    assert replica.answers == [{1}, {1}]


async def test_one_that_is_cancelled_makes_room() -> None:
    replica = Replica()
    running = asyncio.create_task(replica.answer(10_000))
    await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert replica.gate.num_running == 0
    assert await replica.take(2, alone=True, drain_s=1.0) == 0
