"""Waits end and say who did not answer; busy time counts overlaps once."""

import asyncio
import re
import time

import pytest

from contracts import clock as clock_module
from contracts.clock import BusyClock
from contracts.waiting import NoAnswer, answer


async def test_an_answer_in_time_is_passed_on():
    async def says():
        return 7

    assert await answer(says(), who="w", asked="speak", deadline_s=1) == 7


async def test_no_answer_names_who_what_and_the_deadline():
    with pytest.raises(NoAnswer) as raised:
        await answer(asyncio.Event().wait(), who="rollout actor r3", asked="take weights version 9", deadline_s=0.01)
    said = r"rollout actor r3 did not answer within 0\.01 s, asked \d+\.\d s ago to take weights version 9"
    assert re.fullmatch(said, str(raised.value))
    assert isinstance(raised.value, TimeoutError)


async def test_no_answer_names_the_node_and_the_seconds_that_really_passed():
    async def stops_the_loop():
        time.sleep(0.2)  # noqa: ASYNC251 as a process that was stopped
        await asyncio.Event().wait()

    with pytest.raises(NoAnswer) as raised:
        await answer(stops_the_loop(), who="r3", asked="x", deadline_s=0.01, node="10.0.0.7")
    said = re.fullmatch(
        r"r3 on node 10\.0\.0\.7 did not answer within 0\.01 s, asked (\d+\.\d) s ago to x", str(raised.value)
    )
    assert said
    assert float(said[1]) >= 0.2


async def test_what_did_not_answer_is_cancelled():
    cancelled = asyncio.Event()

    async def never():
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(NoAnswer):
        await answer(never(), who="w", asked="speak", deadline_s=0.01)
    assert cancelled.is_set()


async def test_an_error_is_an_answer():
    async def fails():
        raise KeyError("k")

    with pytest.raises(KeyError):
        await answer(fails(), who="w", asked="speak", deadline_s=1)


async def test_being_cancelled_is_not_a_missing_answer():
    waiting = asyncio.create_task(answer(asyncio.Event().wait(), who="w", asked="speak", deadline_s=60))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets."""
    time = {"now": 100.0}
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: time["now"])
    return time


def test_overlapping_things_count_once_and_gaps_do_not(now):
    clock = BusyClock()
    now["now"] = 101.0
    clock.__enter__()  # busy from 101
    now["now"] = 103.0
    clock.__enter__()
    assert clock.active == 2
    now["now"] = 106.0
    clock.__exit__(None, None, None)
    now["now"] = 107.0
    clock.__exit__(None, None, None)  # to 107
    assert (clock.active, clock.seconds()) == (0, 6.0)
    now["now"] = 150.0
    assert clock.seconds() == 6.0
    with clock:
        now["now"] = 152.0
        assert clock.seconds() == 8.0  # the current stretch counts
    assert clock.seconds() == 8.0


def test_a_thing_that_fails_has_ended(now):
    clock = BusyClock()

    def fail():
        with clock:
            now["now"] += 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    now["now"] += 5
    assert (clock.active, clock.seconds()) == (0, 2.0)
