"""Whose turn it is: never more than half of those that serve, never none, and nobody's silence stops the others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.turns import Turns


def poll(turns: Turns, name: str, now: float, *, version: int = 1, starting: bool = False, slot: str = "live") -> bool:
    turns.polled(slot, name, version, 0, now, 10.0, starting=starting)
    return turns.may_change(slot, name, now)


def turns_of(num: int) -> Turns:
    turns = Turns()
    for number in range(num):
        poll(turns, f"r{number}", 0.0)
    return turns


@pytest.mark.parametrize(("num", "at_once"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (9, 4)])
def test_half_of_them_change_at_once_and_at_least_one(num: int, at_once: int) -> None:
    turns = turns_of(num)
    changing = 0
    for number in range(num):
        if poll(turns, f"r{number}", 1.0):
            turns.changes("live", f"r{number}", 1.0, 100.0)
            changing += 1
    assert changing == at_once
    turns.changed("live", "r0", 2, "", 2.0)
    assert poll(turns, f"r{num - 1}", 2.0)


def test_one_that_starts_takes_nobodys_turn_and_does_not_answer_for_others() -> None:
    turns = turns_of(1)
    assert poll(turns, "new", 0.0, starting=True)
    turns.changes("live", "new", 0.0, 100.0)
    assert poll(turns, "r0", 1.0)
    assert turns.alone("live", "r0")
    assert not turns.alone("live", "new")
    turns.changed("live", "new", 2, "", 2.0)
    assert turns.alone("live", "r0")  # until it says that it serves
    poll(turns, "new", 3.0, version=2)
    assert not turns.alone("live", "r0")


def test_slots_have_turns_of_their_own() -> None:
    turns = turns_of(1)
    turns.changes("live", "r0", 0.0, 100.0)
    assert poll(turns, "p", 1.0, slot="pinned-3")
    assert turns.alone("pinned-3", "p")


def test_who_died_with_an_order_holds_the_others_up_for_half_a_minute_and_not_for_its_deadline() -> None:
    turns = turns_of(2)
    turns.changes("live", "r0", 0.0, 330.0)
    turns.at_work("live", "r0", 1.0)
    assert not poll(turns, "r1", 30.0)
    assert turns.next_change_s(30.0) == pytest.approx(1.0)
    assert poll(turns, "r1", 31.0)


def test_who_says_that_it_works_keeps_the_turn_until_its_deadline() -> None:
    turns = turns_of(2)
    turns.changes("live", "r0", 0.0, 100.0)
    for now in range(0, 120, 5):
        turns.at_work("live", "r0", float(now))
        assert poll(turns, "r1", now + 1.0) == (now + 1 >= 100)


def test_who_does_not_finish_in_time_loses_the_turn_and_who_falls_silent_is_gone() -> None:
    turns = turns_of(2)
    turns.changes("live", "r0", 1.0, 50.0)
    assert not poll(turns, "r1", 40.0)
    assert turns.next_change_s(40.0) == 11.0
    assert poll(turns, "r1", 51.0)
    assert [(each["replica"], each["state"]) for each in turns.status(51.0)] == [("r0", "late"), ("r1", "serving")]
    assert turns.alone("live", "r1")
    assert [each["replica"] for each in turns.status(90.0)] == ["r1"]
    assert turns.status(92.0) == []


def test_who_has_left_is_waited_for_by_nobody_and_does_not_come_back() -> None:
    turns = turns_of(2)
    turns.changes("live", "r0", 1.0, 100.0)
    assert not poll(turns, "r1", 2.0)
    assert turns.leaves("live", "r0")
    assert not poll(turns, "r0", 3.0)  # a question that was on its way
    turns.changed("live", "r0", 2, "", 3.0)
    assert poll(turns, "r1", 3.0)
    assert turns.alone("live", "r1")
    assert [each["replica"] for each in turns.status(3.0)] == ["r1"]
    assert not turns.leaves("live", "r0")


def test_a_refusal_is_followed_by_pauses_that_grow() -> None:
    turns = turns_of(1)
    pauses = []
    for _ in range(5):
        turns.changes("live", "r0", 100.0, 50.0)
        turns.changed("live", "r0", 1, "it is damaged", 100.0)
        assert turns.refused("live", "r0")
        assert turns.status(100.0)[0]["error"] == "it is damaged"
        pause = turns.next_change_s(100.0)
        pauses.append(0.0 if poll(turns, "r0", 100.0) else pause)
    assert pauses == [0.0, 5.0, 20.0, 60.0, 60.0]  # at once with a keyframe, then slower
    turns.changed("live", "r0", 2, "", 200.0)
    assert not turns.refused("live", "r0")
    assert poll(turns, "r0", 200.0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(num=st.integers(1, 7), steps=st.lists(st.tuples(st.integers(0, 6), st.sampled_from("pcdl")), max_size=60))
def test_whatever_they_do_as_many_serve_as_change_and_somebody_may_always_change(
    num: int, steps: list[tuple[int, str]]
) -> None:
    turns, now = turns_of(num), 0.0
    changing: dict[str, float] = {}
    names = [f"r{number}" for number in range(num)]
    for number, step in steps:
        name, now = names[number % num], now + 1.0
        changing = {each: until for each, until in changing.items() if until > now}
        if step == "p" and name not in changing and poll(turns, name, now):
            turns.changes("live", name, now, 15.0)
            changing[name] = now + 15.0
        elif step == "c" and name in changing:
            turns.changed("live", name, 2, "", now)
            del changing[name]
        elif step == "l":
            assert turns.leaves("live", name) or name not in changing
            changing.pop(name, None)
            assert not poll(turns, name, now)
            name = names[number % num] = f"{name}'"  # who comes instead
        states = [each["state"] for each in turns.status(now)]
        assert states.count("changing") == len(changing) <= max(1, states.count("serving") + 1)
        if not changing:
            assert poll(turns, name, now)
