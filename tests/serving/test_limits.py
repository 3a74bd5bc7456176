"""Rates and the door: a slow reference beside them, and what they must never do."""

from hypothesis import given
from hypothesis import strategies as st

from serving.limits import Admission, Rates, TokenBucket


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1500)), max_size=40),
)
def test_no_window_lets_more_through_than_the_rate_and_one_full_bucket(
    per_minute: int, asked: list[tuple[float, float]]
) -> None:
    bucket, now_s, taken = TokenBucket(per_minute, 0.0), 0.0, [(0.0, 0.0)]
    for pause_s, amount in asked:
        now_s += pause_s
        if bucket.take(amount, now_s=now_s) == 0.0:
            taken.append((now_s, min(amount, per_minute)))
    for first in range(len(taken)):
        span_s, total = taken[-1][0] - taken[first][0], sum(amount for _, amount in taken[first:])
        assert total <= per_minute * (1 + span_s / 60) + 1e-6


@given(st.integers(1, 1000), st.floats(0, 2000), st.floats(0, 2000))
def test_who_waits_as_long_as_told_is_let_through(per_minute: int, first: float, second: float) -> None:
    bucket = TokenBucket(per_minute, 0.0)
    assert bucket.take(first, now_s=0.0) == 0.0
    wait_s = bucket.take(second, now_s=0.0)
    assert wait_s == 0.0 or bucket.take(second, now_s=wait_s + 1e-6) == 0.0


def test_what_was_reserved_and_not_used_comes_back_and_what_was_used_beyond_it_is_owed() -> None:
    rates = Rates(60)
    assert rates.take("anna", 60, now_s=0.0) == 0.0
    assert rates.take("anna", 1, now_s=0.0) == 1.0
    assert rates.take("ben", 60, now_s=0.0) == 0.0
    rates.settle("anna", 60, 10, now_s=0.0)
    assert rates.take("anna", 50, now_s=0.0) == 0.0
    rates.settle("anna", 50, 80, now_s=0.0)
    assert rates.take("anna", 1, now_s=0.0) == 31.0
    assert Rates(None).take("anna", 10**9, now_s=0.0) == 0.0


def test_waiting_is_bounded_over_all_slots_and_places_may_change() -> None:
    door = Admission(max_waiting=2)
    door.set_places("live", 2)
    door.set_places("pinned-3", 1)
    assert [door.enter("live") for _ in range(4)] == [True] * 4
    assert (door.waiting, door.inside) == (2, 4)
    assert not door.enter("live")
    assert not door.full
    assert door.enter("pinned-3")  # a place is free there
    assert not door.enter("pinned-3")
    assert door.full
    door.set_places("live", 4)
    assert door.waiting == 0
    assert door.enter("pinned-3")
    door.set_places("live", 1)  # a replica has left: those who are inside stay
    assert (door.waiting, door.enter("live")) == (4, False)
    for _ in range(4):
        door.leave("live")
    assert door.enter("live")
