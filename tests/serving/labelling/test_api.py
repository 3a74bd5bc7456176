"""The labelling API without Ray: what goes in, what is kept, what is refused and what the refusal says."""

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from contracts.labelling import LabellingConfig
from feedback.store import Store
from serving.labelling import labelling_app
from tests.serving.labelling.conftest import HOSTILE, Annotator

Add = Callable[..., str]
Join = Callable[[str], Annotator]


def rows(place: Path, query: str) -> list[tuple]:
    connection = sqlite3.connect(place)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_sides_become_a_and_b_and_who_wrote_what_is_said_after_the_vote(place: Path, pair: Add, join: Join) -> None:
    for number in range(12):
        pair(number)
    anna = join("anna")
    sides = set()
    for number in range(12):
        task = anna.next()
        assert "version" not in json.dumps(task)
        shown = [response["text"].split()[0] for response in task["responses"]]
        assert sorted(shown) == ["first", "second"]
        status, receipt = anna.vote(task, f"k{number}", choice="left", aspects={"helpful": "right"}, strength=2)
        assert status == 200
        versions = {"first": 3, "second": 4}
        assert receipt["weights_versions"] == [versions[text] for text in shown]
        ((choice, left, aspects),) = rows(
            place, f"SELECT choice, shown_left, aspects FROM judgments WHERE id = {receipt['judgment_id']}"
        )
        meant = {"first": "a", "second": "b"}
        assert (choice, left) == (meant[shown[0]], meant[shown[0]])
        assert json.loads(aspects) == {"helpful": meant[shown[1]]}
        sides.add(left)
    assert sides == {"a", "b"}, "the order is random"
    assert anna.next() is None


def test_labels_and_ratings_take_values(store: Store, place: Path, join: Join) -> None:
    prompt = store.add_prompt("question")
    response = store.add_response(prompt, "answer", source="file")
    store.add_task("label", response)
    store.add_task("rating", response, scale=7)
    anna = join("anna")
    for number in range(2):
        task = anna.next()
        assert [shown["text"] for shown in task["responses"]] == ["answer"]
        status, receipt = anna.vote(task, f"k{number}", value=1 if task["kind"] == "label" else 7)
        assert (status, receipt["weights_versions"]) == (200, [None])
    assert rows(place, "SELECT kind, value FROM judgments JOIN tasks ON task_id = tasks.id ORDER BY kind") == [
        ("label", 1.0),
        ("rating", 7.0),
    ]


def test_a_skip_does_not_say_who_wrote_what(pair: Add, join: Join) -> None:
    pair()
    anna = join("anna")
    status, receipt = anna.vote(anna.next(), choice="skip")
    assert (status, receipt["weights_versions"]) == (200, None)


def test_sent_again_it_is_one_vote(place: Path, pair: Add, join: Join) -> None:
    pair()
    anna = join("anna")
    task = anna.next()
    first, second = anna.vote(task, choice="tie"), anna.vote(task, choice="tie")
    assert (first[0], second[0]) == (200, 200)
    assert second[1] == first[1] | {"repeated": True}
    assert len(rows(place, "SELECT id FROM judgments")) == 1
    assert anna.vote(task, choice="left")[1]["error"]["code"] == "key_reused"
    assert anna.vote(task, "other", choice="tie")[1]["error"]["code"] == "lease_ended"


def test_undo_brings_the_task_again(place: Path, pair: Add, join: Join) -> None:
    pair()
    anna = join("anna")
    task = anna.next()
    judgment = anna.vote(task, choice="left")[1]["judgment_id"]
    for _ in range(2):  # sent again it is one undo
        status, back = anna.send("POST", f"judgments/{judgment}/undo", {"idempotency_key": "u"})
        assert (status, back["task"]["task_id"]) == (200, task["task_id"])
    assert anna.vote(back["task"], "again", choice="right")[0] == 200
    assert [act for (act,) in rows(place, "SELECT act FROM judgments ORDER BY id")] == ["vote", "undo", "vote"]


def test_leases_keep_others_out_until_they_are_given_back(pair: Add, join: Join) -> None:
    pair(required_votes=1)
    anna, ben = join("anna"), join("ben")
    task = anna.next()
    assert ben.next() is None
    assert anna.send("POST", f"leases/{task['lease_id']}/renew")[1]["deadline_s"] >= task["deadline_s"]
    assert ben.send("POST", f"leases/{task['lease_id']}/release")[1]["error"]["code"] == "no_lease"
    assert ben.vote(task, choice="left")[1]["error"]["code"] == "no_lease"
    assert anna.send("POST", f"leases/{task['lease_id']}/release") == (200, {"released": True})
    assert ben.next()["task_id"] == task["task_id"]


def test_gold_checks_look_like_any_task(store: Store, place: Path, pair: Add) -> None:
    pair(0)
    gold = pair(1, gold="a")
    with TestClient(labelling_app(LabellingConfig(store=str(place), gold_rate=1.0))) as client:
        task = Annotator(client, *store.register("anna")).next()
    assert task["task_id"] == gold
    assert "gold" not in json.dumps(task)


def test_progress_and_session(pair: Add, join: Join) -> None:
    pair(0, required_votes=2)
    anna = join("anna")
    assert anna.vote(anna.next(), choice="both_bad")[0] == 200
    _, session = anna.send("GET", "session")
    assert session["annotator_id"] == anna.annotator_id
    assert session["progress"] == anna.send("GET", "progress")[1]
    assert session["progress"] == {"voted": 1, "skipped": 0, "votes": 1, "required_votes": 2, "open_tasks": 1}
    assert "Tie" in session["guidelines"]["text"]
    assert len(session["guidelines"]["version"]) == 12


def test_what_may_offend_is_marked(pair: Add, join: Join, tmp_path: Path, store: Store, place: Path) -> None:
    pair(a="what the FUCK", b="a class on Scunthorpe", required_votes=2)
    task = join("anna").next()
    marks = {shown["text"]: shown["offensive"] for shown in task["responses"]}
    assert marks == {"what the FUCK": True, "a class on Scunthorpe": False}
    assert task["prompt"]["offensive"] is False
    words = tmp_path / "words.txt"
    words.write_text("Question\n", encoding="utf-8")
    config = LabellingConfig(store=str(place), offensive_words=words, gold_rate=0)
    with TestClient(labelling_app(config)) as client:
        task = Annotator(client, *store.register("ben")).next()
    assert task["prompt"]["offensive"] is True


BAD: dict[str, tuple[dict[str, object], int, str, str]] = {
    "an impossible choice": ({"choice": "a"}, 422, "bad_choice", "left, right, tie"),
    "no answer": ({}, 422, "bad_choice", "choice"),
    "a value for a pair": ({"value": 1}, 422, "bad_choice", "choice"),
    "an impossible strength": ({"choice": "left", "strength": 9}, 422, "bad_value", "1 to 3"),
    "a negative time": ({"choice": "left", "active_s": -1}, 422, "bad_time", "active_s"),
    "more time than passed": ({"choice": "left", "active_s": 5000}, 422, "bad_time", "shown"),
    "a number for a text": ({"choice": 1}, 422, "bad_request", "choice"),
    "an unknown field": ({"choice": "left", "vote": "a"}, 422, "bad_request", "vote"),
    "true for a number": ({"choice": "left", "strength": True}, 422, "bad_request", "strength"),
    "no key": ({"choice": "left", "idempotency_key": " "}, 422, "bad_text", "idempotency_key"),
    "a NUL": ({"choice": "left", "rationale": "\0"}, 422, "bad_text", "NUL"),
    "half a character": ({"choice": "left", "rationale": "\ud800"}, 422, "bad_text", "rationale"),
    "a side for an aspect that is none": ({"choice": "left", "aspects": {"x": "up"}}, 422, "bad_choice", "aspect x"),
    "a task that does not exist": ({"choice": "left", "task_id": "none"}, 404, "unknown_task", "api/next"),
    "a lease that does not exist": ({"choice": "left", "lease_id": "none"}, 409, "no_lease", "api/next"),
    "a text that is too long": ({"choice": "left", "rationale": "x" * 10_001}, 422, "bad_text", "10000"),
    "a body that is too large": ({"choice": "left", "rationale": "x" * 20_001}, 413, "too_large", "20000 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_votes_are_refused_with_a_reason_and_nothing_is_kept(case: str, place: Path, pair: Add, join: Join) -> None:
    said, expected, code, part = BAD[case]
    pair()
    anna = join("anna")
    task = anna.next()
    body = {"task_id": task["task_id"], "lease_id": task["lease_id"], "idempotency_key": "k"} | said
    answer = anna.client.post(
        "/api/judgments",
        content=json.dumps(body),
        headers={"Authorization": f"Bearer {anna.token}", "Content-Type": "application/json"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["status"], error["code"]) == (expected, expected, code)
    assert part in error["message"]
    assert rows(place, "SELECT count(*) FROM judgments") == [(0,)]
    assert anna.vote(task, choice="left")[0] == 200, "the lease still holds"


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 9000, b"\xff\xfe", b"null", b"[]", b'{"task_id": NaN}'])
def test_a_body_that_is_no_json_is_refused(body: bytes, join: Join) -> None:
    anna = join("anna")
    headers = {"Authorization": f"Bearer {anna.token}", "Content-Type": "application/json"}
    answer = anna.client.post("/api/judgments", content=body, headers=headers)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_without_a_token_of_somebody_active_nothing_is_said(store: Store, join: Join, client: TestClient) -> None:
    gone = join("gone")
    store.set_active(gone.annotator_id, False)
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic eA=="}, gone_header(gone)):
        for method, path in (("GET", "session"), ("POST", "next"), ("GET", "progress"), ("POST", "leases/x/renew")):
            answer = client.request(method, f"/api/{path}", headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (401, "unknown_annotator")
            assert "token" in error["message"]
            assert answer.headers["WWW-Authenticate"] == "Bearer"


def gone_header(annotator: Annotator) -> dict[str, str]:
    return {"Authorization": f"Bearer {annotator.token}"}


def test_a_lease_that_ended_says_so(store: Store, place: Path, pair: Add) -> None:
    pair()
    with TestClient(labelling_app(LabellingConfig(store=str(place), lease_s=0.05, gold_rate=0))) as client:
        anna = Annotator(client, *store.register("anna"))
        task = anna.next()
        time.sleep(0.1)
        status, answer = anna.vote(task, choice="left")
    assert (status, answer["error"]["code"]) == (410, "lease_expired")
    assert "api/next" in answer["error"]["message"]


def test_a_busy_store_says_to_send_it_again(place: Path, store: Store, pair: Add) -> None:
    pair()
    with TestClient(labelling_app(LabellingConfig(store=str(place), request_s=0.4))) as client:
        anna = Annotator(client, *store.register("anna"))
        other = sqlite3.connect(place, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        status, answer = anna.send("POST", "next")
        other.execute("ROLLBACK")
        other.close()
        assert (status, answer["error"]["code"]) == (503, "busy")
        assert "same idempotency_key" in answer["error"]["message"]
        assert anna.next() is not None


def test_every_answer_is_closed_to_scripts_of_others(client: TestClient, join: Join, pair: Add) -> None:
    pair(a=HOSTILE)
    anna = join("anna")
    texts = {shown["text"] for shown in anna.next()["responses"]}
    assert HOSTILE in texts, "texts are handed on as they are"
    for path in ("/", "/page/page.js", "/page/page.css", "/page/common.css", "/api/health", "/none"):
        answer = client.get(path)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "<script>" not in client.get("/").text, "no inline script"
    assert client.get("/none").json()["error"]["status"] == 404
    assert client.get("/api/next").json()["error"]["status"] == 405
    assert client.get("/page/../api.py").status_code == 404
