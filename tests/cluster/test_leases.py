"""The lease book: issued = trained + quarantined + expired + open, after every event."""

import json
import random
from collections import Counter

import pytest

from cluster.leases import Lease, LeaseBook, LeaseCounts
from contracts.records import Prompt
from learner.experience_queue import ScoredGroup, StalenessBound
from tests.rollouts import scored_rollout


def prompt(name="p0"):
    return Prompt(prompt_id=name, tokens=[1], text="q", messages=[])


def book(*, max_lag_steps=1, groups_per_batch=2, num_samples=4):
    return LeaseBook(StalenessBound(max_lag_steps, groups_per_batch), num_samples)


def scored(lease, *, without=0):
    samples = tuple(scored_rollout(name, group_id=lease.group_id) for name in lease.trajectory_ids[without:])
    return ScoredGroup(lease.group_id, lease.started_version, samples)


def numbers(leases):
    counts = leases.counts
    return (counts.issued, counts.trained, counts.quarantined, counts.expired, counts.open)


def test_every_trajectory_of_a_group_has_its_own_id_and_no_group_repeats_one():
    leases = book()
    first, second = (leases.issue(prompt(), version=0, actor_id="a") for _ in range(2))
    assert len({*first.trajectory_ids, *second.trajectory_ids}) == 8


def test_a_group_that_is_trained_is_open_until_its_batch_is_in_the_log():
    leases = book()
    lease = leases.issue(prompt(), version=3, actor_id="a")
    assert leases.running() == {3: 1}
    assert numbers(leases) == (4, 0, 0, 0, 4)
    leases.queued(lease)
    assert leases.running() == {}
    assert numbers(leases) == (4, 0, 0, 0, 4)
    leases.trained([scored(lease)])
    assert numbers(leases) == (4, 4, 0, 0, 0)


def test_an_expired_group_is_counted_whole():
    leases = book()
    lease = leases.issue(prompt(), version=0, actor_id="a")
    leases.issue(prompt(), version=0, actor_id="a")
    leases.expire(lease)
    assert numbers(leases) == (8, 0, 0, 4, 4)
    assert leases.running() == {0: 1}


def test_a_group_with_bad_samples_trains_on_the_others():
    leases = book()
    lease = leases.issue(prompt(), version=0, actor_id="a")
    leases.quarantine(lease)
    assert numbers(leases) == (4, 0, 1, 0, 3)
    assert leases.running() == {0: 1}
    leases.queued(lease)
    leases.trained([scored(lease, without=1)])
    assert numbers(leases) == (4, 3, 1, 0, 0)


def test_bad_samples_of_an_expired_group_are_not_counted_twice():
    leases = book()
    lease = leases.issue(prompt(), version=0, actor_id="a")
    leases.quarantine(lease)
    leases.quarantine(lease)
    leases.expire(lease)
    assert numbers(leases) == (4, 0, 2, 2, 0)


def test_a_group_without_a_good_sample_ends():
    leases = book(num_samples=2)
    lease = leases.issue(prompt(), version=0, actor_id="a")
    leases.quarantine(lease)
    leases.quarantine(lease)
    assert numbers(leases) == (2, 0, 2, 0, 0)
    assert leases.running() == {}
    assert leases.open_prompts == []


def test_a_lease_issued_again_keeps_its_ids_and_its_age_and_counts_once():
    leases = book()
    lease = leases.issue(prompt(), version=2, actor_id="dead")
    leases.quarantine(lease)
    again = leases.reissue(lease, version=5, actor_id="alive")
    assert again.trajectory_ids == lease.trajectory_ids
    assert (again.actor_id, again.attempt) == ("alive", 2)
    # Samples that came back before the death are kept, and their tokens are of version 2.
    assert again.started_version == 2
    assert leases.running() == {2: 1}
    assert numbers(leases) == (4, 0, 1, 0, 3)
    leases.queued(again)
    leases.trained([scored(again, without=1)])
    assert numbers(leases) == (4, 3, 1, 0, 0)


def test_a_lease_is_not_issued_again_to_weights_older_than_it_was_admitted_for():
    leases = book(max_lag_steps=0)
    lease = leases.issue(prompt(), version=3, actor_id="dead")
    with pytest.raises(ValueError, match=r"g00000000.*version 2.*3"):
        leases.reissue(lease, version=2, actor_id="behind")


def test_running_and_queued_groups_both_take_places():
    leases = book(max_lag_steps=1, groups_per_batch=2)
    issued = []
    while leases.may_start(0, training_version=0):
        issued.append(leases.issue(prompt(), version=0, actor_id="a"))
    assert len(issued) == 4  # batches 0 and 1
    leases.queued(issued[0])
    assert not leases.may_start(0, training_version=0)
    leases.expire(issued[1])
    assert leases.may_start(0, training_version=0)


def test_the_oldest_start_is_the_first_version_that_has_room():
    leases = book(max_lag_steps=1, groups_per_batch=2)
    assert leases.oldest_start(training_version=0) == 0
    for _ in range(4):  # batches 0 and 1
        leases.issue(prompt(), version=0, actor_id="a")
    assert leases.oldest_start(training_version=0) == 1
    assert leases.oldest_start(training_version=3) == 4  # 4 and what is out: batches 3 to 5


def test_the_oldest_running_group_is_the_first_issued_that_is_neither_queued_nor_given_up():
    leases = book()
    assert leases.oldest_running == 0
    first, second, third = (leases.issue(prompt(), version=0, actor_id="a") for _ in range(3))
    leases.queued(second)
    leases.reissue(first, version=0, actor_id="b")
    assert leases.oldest_running == 0
    leases.expire(first)
    assert leases.oldest_running == 2
    leases.drop(third)
    assert leases.oldest_running == 3  # the next one


@pytest.mark.parametrize("seed", range(20))
def test_the_counts_kept_up_to_date_are_those_of_counting_everything(seed):
    draw = random.Random(seed)
    leases = book(num_samples=2)
    running: dict[str, Lease] = {}
    queued: dict[str, Lease] = {}
    bad: Counter[str] = Counter()
    for turn in range(200):
        act = draw.choice(["issue", "issue", "queue", "queue", "train", "expire", "drop", "bad", "reissue", "resume"])
        if act == "issue":
            lease = leases.issue(prompt(), version=turn // 40, actor_id="a")
            running[lease.group_id] = lease
        elif act == "train" and queued:
            leases.trained([scored(queued.pop(draw.choice(list(queued))), without=0)])
        elif act == "resume" and draw.random() < 0.2:
            left = [scored(lease) for lease in queued.values()]
            state, leases, running = json.loads(json.dumps(leases.state())), book(num_samples=2), {}
            leases.restore(state, left)
        elif running and act in ("queue", "expire", "drop", "bad", "reissue"):
            lease = running[draw.choice(list(running))]
            if act == "reissue":
                running[lease.group_id] = leases.reissue(lease, version=turn // 40, actor_id="b")
                continue
            if act == "bad":
                leases.quarantine(lease)
                bad[lease.group_id] += 1
                if bad[lease.group_id] < 2:
                    continue
            del running[lease.group_id]
            if act == "queue":
                leases.queued(lease)
                queued[lease.group_id] = lease
            elif act != "bad":
                getattr(leases, act)(lease)
        by_version = Counter(lease.started_version for lease in running.values())
        assert dict(leases.running()) == dict(by_version)
        started = by_version + Counter(lease.started_version for lease in queued.values())
        for version in range(6):
            room = leases.bound.room(started, version=version, training_version=turn // 40)
            assert leases.may_start(version, training_version=turn // 40) == (room >= 1)
        assert leases.open_groups == len(running) + len(queued)


def test_open_prompts_are_those_of_running_leases_oldest_first():
    leases = book()
    first, second, third = (leases.issue(prompt(name), version=0, actor_id="a") for name in ("p1", "p2", "p3"))
    leases.queued(second)
    assert [each.prompt_id for each in leases.open_prompts] == ["p1", "p3"]
    leases.expire(first)
    assert leases.open_prompts == [third.prompt]


def test_a_resumed_book_accounts_for_what_was_running_as_expired():
    leases = book()
    trained, queued, running, expired = (leases.issue(prompt(), version=v, actor_id="a") for v in (0, 1, 1, 0))
    leases.queued(trained)
    leases.trained([scored(trained)])
    leases.quarantine(queued)
    leases.queued(queued)
    leases.quarantine(running)
    leases.expire(expired)
    assert numbers(leases) == (16, 4, 2, 4, 6)

    resumed = book()
    waiting = scored(queued, without=1)
    resumed.restore(json.loads(json.dumps(leases.state())), [waiting])
    assert numbers(resumed) == (16, 4, 2, 7, 3)
    assert numbers(leases) == (16, 4, 2, 4, 6)  # saving changes nothing
    resumed.trained([waiting])
    assert numbers(resumed) == (16, 7, 2, 7, 0)
    fresh = resumed.issue(prompt(), version=2, actor_id="a")
    old_ids = {lease.group_id for lease in (trained, queued, running, expired)}
    assert fresh.group_id not in old_ids


def test_queued_groups_of_a_checkpoint_take_places_after_resume():
    leases = book(max_lag_steps=0, groups_per_batch=2)
    issued = [leases.issue(prompt(), version=0, actor_id="a") for _ in range(2)]
    for lease in issued:
        leases.queued(lease)
    resumed = book(max_lag_steps=0, groups_per_batch=2)
    resumed.restore(leases.state(), [scored(lease) for lease in issued])
    assert not resumed.may_start(0, training_version=0)


def test_open_follows_from_the_others():
    assert LeaseCounts(issued=10, trained=4, quarantined=1, expired=2).open == 3
