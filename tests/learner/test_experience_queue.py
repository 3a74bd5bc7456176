"""The staleness bound in literal numbers, and a queue that blocks, sorts and never deadlocks."""

import asyncio
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.experience_queue import ExperienceQueue, ScoredGroup, StalenessBound, group_id
from tests.rollouts import scored_rollout

SAMPLE_BYTES = scored_rollout().num_bytes


def group(number, started_version=0, *, num_samples=1):
    name = group_id(number)
    samples = tuple(scored_rollout(f"{name}-{n}", group_id=name) for n in range(num_samples))
    return ScoredGroup(name, started_version, samples)


def queue(*, max_lag_steps=0, groups_per_batch=2, max_samples=100, max_bytes=1 << 30):
    bound = StalenessBound(max_lag_steps, groups_per_batch)
    return ExperienceQueue(bound, max_samples=max_samples, max_bytes=max_bytes)


async def turns(number=20):
    """Let every task that can go on go on."""
    for _ in range(number):
        await asyncio.sleep(0)


def numbers(groups):
    return [int(each.group_id.removeprefix("g")) for each in groups]


# Batches of 4 groups. A group that started at version v trains at v..v+S. While batch n is not chosen, batches
# n..v+S are left for it and everything older: (v + S - n + 1) * 4 places.
@pytest.mark.parametrize(
    ("max_lag_steps", "started", "version", "training_version", "room"),
    [
        (0, {}, 0, 0, 4),
        (0, {0: 3}, 0, 0, 1),
        (0, {0: 4}, 0, 0, 0),
        (0, {}, 0, 1, 0),  # batch 0 is chosen, version 1 is not out: on-policy has to wait
        (0, {}, 1, 1, 4),
        (1, {}, 0, 0, 8),
        (1, {0: 8}, 0, 0, 0),
        (1, {0: 4}, 0, 1, 0),  # batch 1 is the last for version 0, and full
        (1, {0: 3}, 0, 1, 1),
        (1, {0: 4}, 1, 1, 4),
        (1, {}, 0, 2, 0),
        (2, {}, 0, 0, 12),
        (2, {0: 4, 1: 2}, 1, 1, 6),  # batches 1, 2, 3: 12 places
        (2, {0: 4, 1: 2}, 2, 2, 6),
        (2, {}, 0, 3, 0),
        (1, {1: 7}, 0, 1, 1),  # an engine that lags: places of the older count among those of the newer, 8 in all
        (1, {1: 5}, 0, 1, 3),
        (1, {1: 2}, 0, 1, 4),
    ],
)
def test_room_counts_the_places_in_the_batches_that_are_left(max_lag_steps, started, version, training_version, room):
    bound = StalenessBound(max_lag_steps, 4)
    assert max(0, bound.room(started, version=version, training_version=training_version)) == room


@pytest.mark.parametrize(
    ("max_lag_steps", "left", "training_version", "holds"),
    [
        (0, {}, 0, True),
        (0, {0: 1}, 0, False),  # would train at version 1 with lag 1
        (0, {1: 4}, 0, True),
        (0, {1: 5}, 0, False),
        (1, {0: 4}, 0, True),
        (1, {0: 5}, 0, False),
        (1, {0: 1}, 1, False),
        (1, {0: 4, 1: 4}, 0, True),
        (1, {0: 4, 1: 5}, 0, False),
        (1, {0: 5, 1: 3}, 0, False),
        (2, {0: 8}, 0, True),
        (2, {0: 9}, 0, False),
        (2, {0: 4, 1: 4, 2: 4}, 1, True),
        (2, {0: 4, 1: 4, 2: 5}, 1, False),
        (2, {0: 0, 1: 8}, 1, True),
    ],
)
def test_what_is_left_must_fit_into_the_batches_that_follow(max_lag_steps, left, training_version, holds):
    assert StalenessBound(max_lag_steps, 4).holds_after(left, training_version=training_version) is holds


@settings(max_examples=300, deadline=None)
@given(
    started=st.dictionaries(st.integers(0, 9), st.integers(1, 9)),
    max_lag_steps=st.integers(0, 4),
    groups_per_batch=st.integers(1, 4),
    version=st.integers(0, 10),
    training_version=st.integers(0, 10),
)
def test_the_bound_is_that_of_the_plain_formulas(started, max_lag_steps, groups_per_batch, version, training_version):
    bound = StalenessBound(max_lag_steps, groups_per_batch)

    def places(until, from_batch):  # in batches from_batch .. until + S
        return sum(groups_per_batch for _ in range(from_batch, until + max_lag_steps + 1))

    def unconsumed(until):
        return sum(groups for start, groups in started.items() if start <= until)

    def room(at):
        return min(places(until, training_version) - unconsumed(until) for until in range(at, 120))

    assert bound.room(started, version=version, training_version=training_version) == room(version)
    holds = all(unconsumed(until) <= places(until, training_version + 1) for until in range(10) if until in started)
    assert bound.holds_after(started, training_version=training_version) is holds
    oldest = next(at for at in itertools.count() if room(at) >= 1)
    assert bound.oldest_start(started, training_version=training_version) == oldest


def test_with_masks_no_batch_waits_for_what_grows_too_old():
    strict, masks = StalenessBound(1, 4), StalenessBound(1, 4, "mask")
    assert not strict.holds_after({0: 5}, training_version=0)
    assert masks.holds_after({0: 5}, training_version=0)
    # Admission is the same: what is still out takes places in the batches to come.
    assert masks.room({0: 5}, version=1, training_version=1) == strict.room({0: 5}, version=1, training_version=1) == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=12), st.integers(1, 4), st.integers(0, 2))
def test_the_batch_is_that_of_sorting_and_counting_everything(groups, groups_per_batch, max_lag_steps):
    async def check():
        sorts = queue(max_lag_steps=max_lag_steps, groups_per_batch=groups_per_batch)
        for number, (version, num_samples) in enumerate(groups):
            await sorts.put(group(number, version, num_samples=num_samples))
        left = list(sorts.groups)
        for training_version in range(4):
            running = {training_version: 1}
            wanted = sorted(left, key=lambda each: each.started_version)[:groups_per_batch]
            after = Counter(each.started_version for each in left if each not in wanted) + Counter(running)
            bound = StalenessBound(max_lag_steps, groups_per_batch)
            takes = len(wanted) == groups_per_batch and bound.holds_after(after, training_version=training_version)
            batch = sorts.ready(running, training_version=training_version)
            assert batch == (wanted if takes else None)
            if batch:
                await sorts.remove(batch)
                left = [each for each in left if each not in batch]
            assert list(sorts.groups) == left
            assert sorts.started() == Counter(each.started_version for each in left)
            assert sorts.num_samples == sum(len(each.samples) for each in left)
            assert sorts.num_bytes == sum(each.num_bytes for each in left)

    asyncio.run(check())


async def test_put_waits_for_room_in_samples_and_remove_unblocks_it():
    full = queue(max_samples=4)
    first, second, third = (group(number, num_samples=2) for number in (1, 2, 3))
    assert await full.put(first)
    assert await full.put(second)
    blocked = asyncio.create_task(full.put(third))
    await turns()
    assert not blocked.done()
    assert (len(full), full.num_samples) == (2, 4)
    await full.remove([first])
    assert await asyncio.wait_for(blocked, 1) is True
    assert numbers(full.groups) == [2, 3]


async def test_put_waits_for_room_in_bytes():
    # A prompt of 2 and a response of 3 tokens: 8 bytes for each of 2 + 5 * 3 numbers, and 256.
    assert SAMPLE_BYTES == 8 * (2 + 5 * 3) + 256
    full = queue(max_bytes=2 * SAMPLE_BYTES)
    assert await full.put(group(1))
    assert await full.put(group(2))
    assert full.num_bytes == 2 * SAMPLE_BYTES
    blocked = asyncio.create_task(full.put(group(3)))
    await turns()
    assert not blocked.done()
    await full.remove(full.groups[:1])
    assert await asyncio.wait_for(blocked, 1) is True


async def test_a_group_larger_than_the_bound_goes_into_an_empty_queue():
    small = queue(max_samples=2, max_bytes=1)
    assert await asyncio.wait_for(small.put(group(1, num_samples=4)), 1)


async def test_blocked_seconds_are_counted():
    full = queue(max_samples=1)
    await full.put(group(1))
    assert full.blocked_s == pytest.approx(0, abs=0.01)
    blocked = asyncio.create_task(full.put(group(2)))
    await asyncio.sleep(0.05)
    await full.remove(full.groups)
    await blocked
    assert full.blocked_s >= 0.05


async def test_an_id_is_accepted_once_even_after_it_was_trained():
    accepts = queue()
    assert await accepts.put(group(1)) is True
    assert await accepts.put(group(1)) is False
    await accepts.remove(accepts.groups)
    assert await accepts.put(group(1)) is False
    assert len(accepts) == 0


async def test_what_is_settled_is_refused_without_being_remembered():
    accepts = queue(max_lag_steps=1, groups_per_batch=1)
    for number in range(1000):
        assert await accepts.put(group(number))
        await accepts.remove(accepts.groups)
        accepts.settle(number - 2)  # three may still be out
    assert not await accepts.put(group(998))  # remembered
    assert not await accepts.put(group(3))  # settled
    assert not await accepts.put(group(996))
    assert len(accepts._accepted) == 3
    assert await accepts.put(group(1000))


async def test_producers_are_let_in_first_come_first_served_and_only_as_many_as_fit():
    full = queue(max_samples=2)
    for number in (1, 2):
        await full.put(group(number))
    blocked = [asyncio.create_task(full.put(group(number))) for number in (3, 4, 5)]
    await turns()
    late = asyncio.create_task(full.put(group(6)))
    await full.remove(full.groups)
    assert full.num_samples == 2  # their room is taken before they wake up
    await turns()
    assert numbers(full.groups) == [3, 4]
    assert [task.done() for task in (*blocked, late)] == [True, True, False, False]
    await full.remove(full.groups)
    await turns()
    assert numbers(full.groups) == [5, 6]


async def test_a_producer_that_gives_up_leaves_its_room_to_the_next():
    full = queue(max_samples=1)
    await full.put(group(1))
    blocked = [asyncio.create_task(full.put(group(number))) for number in (2, 3, 4)]
    await turns()
    blocked[0].cancel()
    await turns()
    await full.remove(full.groups)
    blocked[1].cancel()  # let in, and not awake yet
    await turns()
    assert numbers(full.groups) == [4]
    assert (full.num_samples, full.num_bytes) == (1, SAMPLE_BYTES)


async def test_a_straggler_is_let_into_a_full_queue_while_the_learner_waits_for_it():
    full = queue(max_lag_steps=1, groups_per_batch=2, max_samples=2)
    await full.put(group(11, 1))
    await full.put(group(12, 1))
    # Batch 1 is the last that may train on version 0, so the straggler must be in it.
    assert full.ready({0: 1}, training_version=1) is None
    straggler = asyncio.create_task(full.put(group(5, 0)))
    await turns()
    assert not straggler.done()
    await asyncio.wait_for(full.wait_changed(timeout_s=1), 1)
    assert straggler.done()
    assert numbers(full.ready({}, training_version=1)) == [5, 11]


async def test_the_bound_is_back_once_the_learner_has_its_batch():
    full = queue(groups_per_batch=1, max_samples=1)
    await full.wait_changed(timeout_s=0.01)
    await full.put(group(1))
    await full.remove(full.groups)
    await full.put(group(2))
    blocked = asyncio.create_task(full.put(group(3)))
    await turns()
    assert not blocked.done()
    blocked.cancel()


async def test_the_oldest_start_is_trained_first_and_ties_in_order_of_arrival():
    sorts = queue(max_lag_steps=2, groups_per_batch=3)
    for number, version in [(3, 2), (9, 0), (2, 1), (4, 0)]:
        await sorts.put(group(number, version))
    assert sorts.started() == Counter({0: 2, 1: 1, 2: 1})
    assert numbers(sorts.ready({}, training_version=2)) == [9, 4, 2]


async def test_a_batch_needs_all_its_groups():
    short = queue(groups_per_batch=2)
    await short.put(group(1))
    assert short.ready({}, training_version=0) is None
    await short.put(group(2))
    assert numbers(short.ready({}, training_version=0)) == [1, 2]


async def test_ready_waits_for_the_straggler_that_would_grow_too_old():
    waits = queue(max_lag_steps=1, groups_per_batch=2)
    for number in (1, 2):
        await waits.put(group(number, 0))
    # Two more at version 0 fit into batch 1; a third would train at version 2 with lag 2.
    assert waits.ready({0: 2}, training_version=0) is not None
    assert waits.ready({0: 3}, training_version=0) is None
    # Queued groups that are left behind count as much as running ones.
    await waits.put(group(3, 0))
    assert waits.ready({0: 1}, training_version=0) is not None
    assert waits.ready({0: 2}, training_version=0) is None


async def test_what_changed_since_the_learner_looked_does_not_let_it_sleep():
    wakes = queue(groups_per_batch=1)
    assert wakes.ready({}, training_version=0) is None
    await wakes.put(group(1))  # between the look and the wait
    await asyncio.wait_for(wakes.wait_changed(timeout_s=60), 1)
    assert wakes.ready({}, training_version=0) is not None


async def test_a_notice_from_outside_wakes_the_learner():
    wakes = queue(groups_per_batch=1)
    await wakes.put(group(1))
    assert wakes.ready({0: 1}, training_version=0) is None  # a group that started as early is still running
    waiting = asyncio.create_task(wakes.wait_changed(timeout_s=60))
    await turns()
    assert not waiting.done()
    wakes.notify()
    await asyncio.wait_for(waiting, 1)


async def test_a_notice_leaves_the_learner_asleep_while_its_batch_is_not_complete():
    wakes = queue(groups_per_batch=2)
    await wakes.put(group(1))
    assert wakes.ready({}, training_version=0) is None
    waiting = asyncio.create_task(wakes.wait_changed(timeout_s=60))
    await turns()
    wakes.notify()
    await turns()
    assert not waiting.done()
    await wakes.put(group(2))
    await asyncio.wait_for(waiting, 1)


async def test_nothing_wakes_the_learner_but_its_timeout():
    sleeps = queue()
    begun = asyncio.get_running_loop().time()
    sleeps.ready({}, training_version=0)
    await sleeps.wait_changed(timeout_s=0.05)
    assert asyncio.get_running_loop().time() - begun >= 0.05


async def test_a_checkpoint_goes_back_into_the_queue_over_its_bound_and_its_ids_stay_known():
    resumed = queue(max_lag_steps=1, groups_per_batch=2, max_samples=1)
    resumed.restore([group(1), group(2)])
    assert numbers(resumed.groups) == [1, 2]
    assert await asyncio.wait_for(resumed.wait_changed(timeout_s=0.01), 1) is None
    assert await resumed.put(group(1)) is False


def test_an_empty_group_is_refused_by_name():
    with pytest.raises(ValueError, match="g7"):
        ScoredGroup("g7", 0, ())
