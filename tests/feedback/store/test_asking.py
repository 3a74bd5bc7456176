"""Who is asked what: order, overlap, leases, gold checks, undoing."""

from collections import Counter
from collections.abc import Callable

import pytest

from feedback.simulate import Pair
from feedback.store import Assignment, Judgment, Progress, Refused, Store
from tests.feedback.store.conftest import Clock, vote

AddPair = Callable[..., str]


def ask(store: Store, annotator_id: int, **options: object) -> Assignment:
    given = store.next_task(annotator_id, **options)  # type: ignore[arg-type]
    assert given is not None
    return given


def refused(code: str, act: Callable[[], object]) -> None:
    with pytest.raises(Refused) as error:
        act()
    assert error.value.code == code


def test_tasks_come_by_priority_then_by_score(store: Store, pair: AddPair, person: int):
    low, high, scored, later = pair(0), pair(1, priority=5), pair(2, score=0.5), pair(3)
    assert store.set_scores({later: 0.25, "nowhere": 9.0}) == 1
    order = []
    for number in range(4):
        given = ask(store, person)
        order.append(given.task_id)
        vote(store, person, given, str(number))
    assert order == [high, scored, later, low]
    assert store.next_task(person) is None


def test_an_assignment_shows_texts_and_hides_who_wrote_them(store: Store, pair: AddPair, person: int):
    task = pair(7)
    given = ask(store, person)
    assert (given.prompt, given.response_a, given.response_b) == ("question 7", "first 7", "second 7")
    receipt = store.submit(person, task, Judgment("k", choice="b"), lease_id=given.lease_id)
    assert (receipt.weights_version_a, receipt.weights_version_b) == (3, 4)
    assert not any("version" in name for name in Assignment.__dataclass_fields__)


def test_sides_are_drawn_anew_for_each_view_and_kept_with_the_vote(store: Store, person: int):
    views = {}
    store.add_pairs([Pair(str(n), "", f"question {n}", "x", "y") for n in range(16)], source="file", required_votes=1)
    for number in range(16):
        given = ask(store, person)
        assert ask(store, person) == given  # a page loaded again shows the same
        views[given.task_id] = given.left
        vote(store, person, given, str(number))
    said = store.export_annotator(person)["judgments"]
    assert {row["task_id"]: row["shown_left"] for row in said} == views
    assert 3 <= Counter(views.values())["a"] <= 13
    assert (store.ballots().left_N == [1.0 if views[p] == "a" else -1.0 for p in store.ballots().pair_ids]).all()


def test_leases_hold_places_and_free_them_when_they_end(store: Store, pair: AddPair, clock: Clock):
    task = pair(required_votes=2)
    anna, ben, cora = (store.register(name)[0] for name in ("anna", "ben", "cora"))
    held = ask(store, anna, lease_s=60)
    ask(store, ben, lease_s=30)
    assert store.next_task(cora) is None
    clock.now += 31
    late = ask(store, cora, lease_s=10)
    assert late.task_id == task
    assert store.renew(anna, held.lease_id, lease_s=100) == clock.now + 100
    store.release(cora, late.lease_id)
    refused("lease_ended", lambda: vote(store, cora, late, "k"))
    again = ask(store, ben, lease_s=10)
    clock.now += 10
    refused("lease_expired", lambda: vote(store, ben, again, "k"))
    refused("lease_expired", lambda: store.renew(ben, again.lease_id))
    vote(store, anna, held, "k")
    vote(store, cora, ask(store, cora), "k")
    assert store.next_task(ben) is None
    assert store.progress(ben) == Progress(0, 0, votes=2, required_votes=2, open_tasks=0)


def test_nobody_is_asked_twice_and_a_skip_leaves_the_place_to_others(store: Store, pair: AddPair, person: int):
    pair()
    vote(store, person, ask(store, person), "k", "skip")
    assert store.next_task(person) is None
    assert store.progress(person) == Progress(0, 1, votes=0, required_votes=1, open_tasks=1)
    ben = store.register("ben")[0]
    vote(store, ben, ask(store, ben), "k")
    assert store.progress(ben) == Progress(1, 0, votes=1, required_votes=1, open_tasks=0)


def test_kinds_of_tasks(store: Store, pair: AddPair, person: int):
    pair()
    prompt = store.add_prompt("p")
    response = store.add_response(prompt, "r", source="live", weights_version=1)
    label = store.add_task("label", response)
    rating = store.add_task("rating", response, scale=7)
    for kind, task, good, bad in (("label", label, 1, 2), ("rating", rating, 7, 8)):
        given = ask(store, person, kinds=[kind])
        assert (given.task_id, given.left, given.response_b) == (task, None, None)

        def submit(value: float, given: Assignment = given) -> object:
            return store.submit(person, given.task_id, Judgment(given.kind, value=value), lease_id=given.lease_id)

        for wrong in (bad, -1, 0.5, float("nan"), True, "1"):
            refused("bad_value", lambda wrong=wrong, submit=submit: submit(wrong))  # type: ignore[misc]
        submit(good)
        assert store.next_task(person, kinds=[kind]) is None
    assert store.ballots("label").choices_N.tolist() == [0]


def test_gold_checks_are_mixed_in_by_rate(store: Store, pair: AddPair, person: int):
    gold = {pair(number, gold="b") for number in range(12)}
    store.add_pairs([Pair(str(n), "", f"question {n}", "x", "y") for n in range(40)], source="file", required_votes=1)
    asked = []
    for number in range(24):
        given = ask(store, person, gold_rate=0.3)
        asked.append(given.task_id in gold)
        vote(store, person, given, str(number), "b" if number % 2 else "a")
    assert 3 <= sum(asked) <= 12
    assert store.gold_checks() == {"anna": (sum(asked[1::2]), sum(asked))}
    assert store.progress(person).required_votes == 40
    ben = store.register("ben")[0]
    assert not any(ask(store, ben, gold_rate=0.0).task_id in gold for _ in range(3))


def test_an_undone_vote_is_superseded_and_asked_again(store: Store, pair: AddPair, person: int):
    task = pair()
    first = vote(store, person, ask(store, person), "1", "a")
    again = store.undo(person, first, idempotency_key="u")
    assert again is not None
    assert again.task_id == task
    assert store.undo(person, first, idempotency_key="u") == again
    assert store.ballots().pair_ids == []
    ben = store.register("ben")[0]
    assert store.next_task(ben) is None  # the place is still Anna's
    vote(store, person, again, "2", "b")
    refused("already_undone", lambda: store.undo(person, first, idempotency_key="u2"))
    refused("unknown_judgment", lambda: store.undo(ben, first, idempotency_key="u"))
    rows = store.export_annotator(person)["judgments"]
    assert [(row["act"], row["choice"], row["supersedes"]) for row in rows] == [
        ("vote", "a", None), ("undo", None, rows[0]["id"]), ("vote", "b", rows[1]["id"]),
    ]  # fmt: skip
    assert store.ballots().choices_N.tolist() == [1]


def test_a_judgment_may_be_sent_again_but_not_changed(store: Store, pair: AddPair, person: int):
    task = pair(required_votes=2)
    given = ask(store, person)
    judgment = Judgment("key", choice="tie", rationale="both fine", aspects={"helpful": "a"}, active_s=0.5)
    receipt = store.submit(person, task, judgment, lease_id=given.lease_id)
    repeated = store.submit(person, task, judgment, lease_id=given.lease_id)
    assert (repeated.judgment_id, repeated.repeated, receipt.repeated) == (receipt.judgment_id, True, False)
    refused("key_reused", lambda: vote(store, person, given, "key", "a"))
    refused("lease_ended", lambda: vote(store, person, given, "other", "a"))
    ben = store.register("ben")[0]
    vote(store, ben, ask(store, ben), "key")  # keys are everybody's own
    assert store.ballots().choices_N.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("bad_choice", {"choice": "left"}),
        ("bad_choice", {"choice": None}),
        ("bad_choice", {"choice": "skip", "strength": 1}),
        ("bad_value", {"choice": "a", "value": 1}),
        ("bad_value", {"choice": "tie", "strength": 1}),
        ("bad_value", {"choice": "a", "strength": 4}),
        ("bad_value", {"choice": "a", "strength": True}),
        ("bad_choice", {"choice": "a", "aspects": {"helpful": "c"}}),
        ("bad_value", {"choice": "a", "aspects": ["helpful"]}),
        ("bad_text", {"choice": "a", "aspects": {" ": "a"}}),
        ("bad_text", {"choice": "a", "rationale": "\ud800"}),
        ("bad_text", {"choice": "a", "rationale": "a\0b"}),
        ("bad_text", {"choice": "a", "rationale": "x" * 10_001}),
        ("bad_text", {"choice": "a", "client_version": 3}),
        ("bad_time", {"choice": "a", "active_s": -1}),
        ("bad_time", {"choice": "a", "active_s": float("inf")}),
        ("bad_time", {"choice": "a", "active_s": "5"}),
        ("bad_time", {"choice": "a", "active_s": 500}),  # longer than it was on the screen
    ],
)
def test_impossible_judgments_leave_the_lease_as_it_was(
    store: Store, pair: AddPair, person: int, clock: Clock, code: str, wrong: dict
):
    pair()
    given = ask(store, person)
    clock.now += 20
    refused(code, lambda: vote(store, person, given, "k", **wrong))
    vote(store, person, given, "k", active_s=20)
    assert len(store.export_annotator(person)["judgments"]) == 1


def test_votes_that_nobody_asked_for(store: Store, pair: AddPair, person: int):
    task, other = pair(0), pair(1)
    given = ask(store, person)
    elsewhere = other if given.task_id == task else task
    yes = Judgment("k", choice="a")
    refused("unknown_task", lambda: store.submit(person, "nowhere", yes, lease_id=given.lease_id))
    refused("unknown_annotator", lambda: store.submit(99, given.task_id, yes, lease_id=given.lease_id))
    refused("unknown_annotator", lambda: store.next_task(99))
    refused("no_lease", lambda: store.submit(person, given.task_id, yes, lease_id="made up"))
    refused("bad_text", lambda: store.submit(person, "\ud800", yes, lease_id=given.lease_id))
    refused("bad_value", lambda: store.undo(person, 10**30, idempotency_key="u"))
    refused("no_lease", lambda: store.submit(person, elsewhere, yes, lease_id=given.lease_id))
    ben = store.register("ben")[0]
    refused("no_lease", lambda: vote(store, ben, given, "k"))
    store.set_active(person, False)
    refused("unknown_annotator", lambda: vote(store, person, given, "k"))
    assert store.ballots().pair_ids == []


def test_tasks_that_make_no_sense(store: Store):
    prompt, other = store.add_prompt("p"), store.add_prompt("q")
    a, b = (store.add_response(prompt, text, source="file") for text in "ab")
    elsewhere = store.add_response(other, "a", source="file")
    refused("unknown_prompt", lambda: store.add_response("nowhere", "x", source="file"))
    refused("bad_task", lambda: store.add_response(prompt, "x", source="web"))  # type: ignore[arg-type]
    refused("unknown_response", lambda: store.add_task("pair", a, "nowhere"))
    refused("bad_task", lambda: store.add_task("pair", a, elsewhere))
    refused("bad_task", lambda: store.add_task("pair", a, a))
    refused("bad_task", lambda: store.add_task("pair", a))
    refused("bad_task", lambda: store.add_task("label", a, b))
    refused("bad_task", lambda: store.add_task("duel", a, b))  # type: ignore[arg-type]
    refused("bad_task", lambda: store.add_task("pair", a, b, gold="left"))
    refused("bad_task", lambda: store.add_task("label", a, gold="2"))
    refused("bad_task", lambda: store.add_task("pair", a, b, required_votes=-1))
    refused("bad_task", lambda: store.add_task("pair", a, b, score=float("nan")))
    refused("bad_text", lambda: store.add_prompt(" "))


def test_feedback_on_served_answers(store: Store, person: int):
    prompt = store.add_prompt("p")
    old, new = (
        store.add_response(prompt, text, source="live", weights_version=v, response_id=f"chatcmpl-{v}")
        for v, text in ((7, "old"), (8, "new"))
    )
    for kind, said in (("thumbs", {"value": 0}), ("rating", {"value": 4}), ("correction", {"text": "better"})):
        store.judge_served(person, kind, old, Judgment(f"{kind}-1", **said))  # type: ignore[arg-type]
    refused("already_voted", lambda: store.judge_served(person, "thumbs", old, Judgment("x", value=1)))
    refused("key_reused", lambda: store.judge_served(person, "thumbs", old, Judgment("thumbs-1", value=1)))
    refused("unknown_response", lambda: store.judge_served(person, "thumbs", "gone", Judgment("y", value=1)))
    for key, one, two in (("k1", old, new), ("k2", new, old)):
        someone = store.register(key)[0]
        liked = Judgment(key, choice="a", aspects={"helpful": "b"})
        options = {"other_response_id": two, "shown_left": "a"}
        receipt = store.judge_served(someone, "pair", one, liked, **options)  # type: ignore[arg-type]
        assert receipt.weights_version_a == (7 if one == old else 8)
        assert store.judge_served(someone, "pair", one, liked, **options).repeated  # type: ignore[arg-type]
        (row,) = store.export_annotator(someone)["judgments"]
        first = {"old": old, "new": new}[row["a"]]
        assert row["choice"] == row["shown_left"] == ("a" if first == one else "b")
        assert row["aspects"] == {"helpful": "b" if first == one else "a"}
    counted = store.ballots()
    assert (len(counted.pair_ids), sorted(counted.choices_N.tolist())) == (1, [0, 1])
    refused("bad_task", lambda: store.judge_served(person, "pair", old, Judgment("z", choice="a")))
    assert store.next_task(person) is None
