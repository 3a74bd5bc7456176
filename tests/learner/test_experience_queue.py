"""The staleness bound in literal numbers, and a queue that blocks, sorts and never deadlocks."""

import asyncio
from collections import Counter

import pytest

from learner.experience_queue import ExperienceQueue, ScoredGroup, StalenessBound
from tests.rollouts import scored_rollout

SAMPLE_BYTES = scored_rollout().num_bytes


def group(group_id, started_version=0, *, num_samples=1):
    samples = tuple(scored_rollout(f"{group_id}-{n}", group_id=group_id) for n in range(num_samples))
    return ScoredGroup(group_id, started_version, samples)


def queue(*, max_lag_steps=0, groups_per_batch=2, max_samples=100, max_bytes=1 << 30):
    bound = StalenessBound(max_lag_steps, groups_per_batch)
    return ExperienceQueue(bound, max_samples=max_samples, max_bytes=max_bytes)


async def turns(number=20):
    """Let every task that can go on go on."""
    for _ in range(number):
        await asyncio.sleep(0)


def ids(groups):
    return [each.group_id for each in groups]


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


async def test_put_waits_for_room_in_samples_and_remove_unblocks_it():
    full = queue(max_samples=4)
    first, second, third = (group(name, num_samples=2) for name in ("a", "b", "c"))
    assert await full.put(first)
    assert await full.put(second)
    blocked = asyncio.create_task(full.put(third))
    await turns()
    assert not blocked.done()
    assert (len(full), full.num_samples) == (2, 4)
    await full.remove([first])
    assert await asyncio.wait_for(blocked, 1) is True
    assert ids(full.groups) == ["b", "c"]


async def test_put_waits_for_room_in_bytes():
    # A prompt of 2 and a response of 3 tokens: 8 bytes for each of 2 + 5 * 3 numbers, and 256.
    assert SAMPLE_BYTES == 8 * (2 + 5 * 3) + 256
    full = queue(max_bytes=2 * SAMPLE_BYTES)
    assert await full.put(group("a"))
    assert await full.put(group("b"))
    assert full.num_bytes == 2 * SAMPLE_BYTES
    blocked = asyncio.create_task(full.put(group("c")))
    await turns()
    assert not blocked.done()
    await full.remove(full.groups[:1])
    assert await asyncio.wait_for(blocked, 1) is True


async def test_a_group_larger_than_the_bound_goes_into_an_empty_queue():
    small = queue(max_samples=2, max_bytes=1)
    assert await asyncio.wait_for(small.put(group("a", num_samples=4)), 1)


async def test_blocked_seconds_are_counted():
    full = queue(max_samples=1)
    await full.put(group("a"))
    assert full.blocked_s == pytest.approx(0, abs=0.01)
    blocked = asyncio.create_task(full.put(group("b")))
    await asyncio.sleep(0.05)
    await full.remove(full.groups)
    await blocked
    assert full.blocked_s >= 0.05


async def test_an_id_is_accepted_once_even_after_it_was_trained():
    accepts = queue()
    assert await accepts.put(group("a")) is True
    assert await accepts.put(group("a")) is False
    await accepts.remove(accepts.groups)
    assert await accepts.put(group("a")) is False
    assert len(accepts) == 0


async def test_a_straggler_is_let_into_a_full_queue_while_the_learner_waits_for_it():
    full = queue(max_lag_steps=1, groups_per_batch=2, max_samples=2)
    await full.put(group("new-1", 1))
    await full.put(group("new-2", 1))
    # Batch 1 is the last that may train on version 0, so the straggler must be in it.
    assert full.ready({0: 1}, training_version=1) is None
    straggler = asyncio.create_task(full.put(group("old", 0)))
    await turns()
    assert not straggler.done()
    await asyncio.wait_for(full.wait_changed(timeout_s=1), 1)
    assert straggler.done()
    assert ids(full.ready({}, training_version=1)) == ["old", "new-1"]


async def test_the_bound_is_back_once_the_learner_has_its_batch():
    full = queue(groups_per_batch=1, max_samples=1)
    await full.wait_changed(timeout_s=0.01)
    await full.put(group("a"))
    await full.remove(full.groups)
    await full.put(group("b"))
    blocked = asyncio.create_task(full.put(group("c")))
    await turns()
    assert not blocked.done()
    blocked.cancel()


async def test_the_oldest_start_is_trained_first_and_ties_in_order_of_arrival():
    sorts = queue(max_lag_steps=2, groups_per_batch=3)
    for name, version in [("c", 2), ("a", 0), ("b", 1), ("a2", 0)]:
        await sorts.put(group(name, version))
    assert sorts.started() == Counter({0: 2, 1: 1, 2: 1})
    assert ids(sorts.ready({}, training_version=2)) == ["a", "a2", "b"]


async def test_a_batch_needs_all_its_groups():
    short = queue(groups_per_batch=2)
    await short.put(group("a"))
    assert short.ready({}, training_version=0) is None
    await short.put(group("b"))
    assert ids(short.ready({}, training_version=0)) == ["a", "b"]


async def test_ready_waits_for_the_straggler_that_would_grow_too_old():
    waits = queue(max_lag_steps=1, groups_per_batch=2)
    for name in ("a", "b"):
        await waits.put(group(name, 0))
    # Two more at version 0 fit into batch 1; a third would train at version 2 with lag 2.
    assert waits.ready({0: 2}, training_version=0) is not None
    assert waits.ready({0: 3}, training_version=0) is None
    # Queued groups that are left behind count as much as running ones.
    await waits.put(group("c", 0))
    assert waits.ready({0: 1}, training_version=0) is not None
    assert waits.ready({0: 2}, training_version=0) is None


async def test_what_changed_since_the_learner_looked_does_not_let_it_sleep():
    wakes = queue(groups_per_batch=1)
    assert wakes.ready({}, training_version=0) is None
    await wakes.put(group("a"))  # between the look and the wait
    await asyncio.wait_for(wakes.wait_changed(timeout_s=60), 1)
    assert wakes.ready({}, training_version=0) is not None


async def test_a_notice_from_outside_wakes_the_learner():
    wakes = queue()
    assert wakes.ready({}, training_version=0) is None
    waiting = asyncio.create_task(wakes.wait_changed(timeout_s=60))
    await turns()
    assert not waiting.done()
    await wakes.notify()
    await asyncio.wait_for(waiting, 1)


async def test_nothing_wakes_the_learner_but_its_timeout():
    sleeps = queue()
    begun = asyncio.get_running_loop().time()
    sleeps.ready({}, training_version=0)
    await sleeps.wait_changed(timeout_s=0.05)
    assert asyncio.get_running_loop().time() - begun >= 0.05


async def test_a_checkpoint_goes_back_into_the_queue_over_its_bound_and_its_ids_stay_known():
    resumed = queue(max_lag_steps=1, groups_per_batch=2, max_samples=1)
    resumed.restore([group("a"), group("b")])
    assert ids(resumed.groups) == ["a", "b"]
    assert await asyncio.wait_for(resumed.wait_changed(timeout_s=0.01), 1) is None
    assert await resumed.put(group("a")) is False


def test_an_empty_group_is_refused_by_name():
    with pytest.raises(ValueError, match="g7"):
        ScoredGroup("g7", 0, ())
