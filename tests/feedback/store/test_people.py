"""Tokens, and a person's data: taken along, and gone when asked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from feedback.store import Gap, Judgment, Refused, Store
from feedback.store.schema import metadata
from tests.feedback.store.conftest import vote


def contents(store: Store, place: str) -> bytes:
    """Of all files of an SQLite store, free pages and log included; of a server, all rows of all tables."""
    if "://" not in place:
        return b"".join(path.read_bytes() for path in Path(place).parent.iterdir())
    with store._database.reader.begin() as connection:
        return repr([connection.execute(table.select()).all() for table in metadata.sorted_tables]).encode()


def test_tokens_are_kept_as_hashes_alone(store: Store, place: str):
    anna, token = store.register("anna")
    assert store.authenticate(token) == anna
    assert b"anna" in contents(store, place)
    assert token.encode() not in contents(store, place)
    newer = store.new_token(anna)
    assert store.authenticate(newer) == anna
    for wrong in (token, "", newer + "x", "\ud800"):
        with pytest.raises(Refused, match="token"):
            store.authenticate(wrong)
    store.set_active(anna, False)
    with pytest.raises(Refused, match="nobody's"):
        store.authenticate(newer)
    with pytest.raises(Refused, match="there is an annotator 'anna' already"):
        store.register("anna")


def test_one_persons_data_is_exported_and_deleted(store: Store, pair: Callable[..., str], place: str):
    tasks = [pair(number, required_votes=2) for number in range(3)]
    anna, ben = store.register("anna-person")[0], store.register("ben")[0]
    said = {}
    for number in range(3):
        for annotator in (anna, ben):
            given = store.next_task(annotator)
            assert given is not None
            choice = "skip" if annotator == anna and number == 2 else "a"
            said[annotator, number] = vote(store, annotator, given, f"k{number}", choice, rationale=f"why-{annotator}")
    store.undo(anna, said[anna, 0], idempotency_key="u")

    exported = json.loads(json.dumps(store.export_annotator(anna)))
    assert exported["annotator"]["name"] == "anna-person"
    assert [row["act"] for row in exported["judgments"]] == ["vote", "vote", "vote", "undo"]
    assert {row["rationale"] for row in exported["judgments"]} == {"why-1", ""}
    assert {row["prompt"] for row in exported["judgments"]} == {f"question {number}" for number in range(3)}
    assert len(exported["leases"]) == 4

    gap = store.delete_annotator(anna)
    assert (gap.judgments, gap.votes, gap.tasks) == (4, 1, 3)  # one vote was undone, one a skip
    assert store.gaps() == [gap]
    assert b"why-2" in contents(store, place)
    for trace in (b"why-1", b"anna-person"):
        assert trace not in contents(store, place)
    with pytest.raises(Refused, match="no annotator"):
        store.export_annotator(anna)
    with pytest.raises(Refused, match="no annotator"):
        store.delete_annotator(anna)

    assert store.progress(ben).votes == 3  # Ben's stay
    assert store.progress(ben).open_tasks == 3
    cora = store.register("cora")[0]
    assert cora not in (anna, ben)
    asked = set()
    for number in range(3):  # what Anna had judged is short of a vote again
        given = store.next_task(cora)
        assert given is not None
        asked.add(given.task_id)
        assert vote(store, cora, given, f"k{number}") > said[ben, 2]  # ids are not given out again
    assert asked == set(tasks)
    run = store.aggregate(method="majority")
    assert (run.gaps, run.judgments, run.tasks) == (1, 6, 3)


def test_gaps_add_up(store: Store, person: int):
    assert store.delete_annotator(person) == Gap(1, 0, 0, 0, 1_000_000.0)
    prompt = store.add_prompt("p")
    response = store.add_response(prompt, "r", source="live")
    ben = store.register("ben")[0]
    store.judge_served(ben, "thumbs", response, Judgment("k", value=1))
    assert store.delete_annotator(ben).judgments == 1
    assert [gap.gap_id for gap in store.gaps()] == [1, 2]
