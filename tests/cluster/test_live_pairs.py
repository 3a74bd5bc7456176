"""Pairs of a policy that is asked over HTTP: a real server, scripted answers."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.live_pairs import LivePairs
from contracts.events import Event
from contracts.labelling import LivePolicy
from feedback.store import Judgment, Store

Answer = tuple[int, Any]


@contextmanager
def policy(answers: Callable[[str, dict[str, Any]], Answer]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The URL of a server that answers so, and what it was asked: path and Authorization."""
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any]) -> None:
            asked.append((self.path, self.headers.get("Authorization", "")))
            status, said = answers(self.path, body)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Not to stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def chat(first: str, second: str, version: int = 3) -> Answer:
    return 200, {"weights_version": version, "choices": [{"message": {"content": text}} for text in (first, second)]}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Why?", "id": "p0"}\n{"prompt": "How?", "id": "p1"}\n', encoding="utf-8")
    return path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "feedback.db") as opened:
        yield opened


async def test_as_many_tasks_as_wanted_are_kept_open(
    store: Store, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_API_KEY", "hr-key")
    count = iter(range(100))
    bodies: list[dict[str, Any]] = []

    def answers(path: str, body: dict[str, Any]) -> Answer:
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy"}]}
        bodies.append(body)
        return chat(f"one {next(count)}", f"two {next(count)}", version=len(bodies))

    with policy(answers) as (url, asked):
        live = LivePolicy(url=url, prompts=prompts, ahead=3, max_pairs=4, temperature=0.7, max_response_tokens=9)
        pairs = LivePairs(live, store, required_votes=1, on_event=lambda event: None, pause_s=0.01)
        running = asyncio.create_task(pairs.keep_open())
        async with asyncio.timeout(30):
            while store.totals().open_tasks < 3:  # noqa: ASYNC110 the store is a file
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            assert (store.totals().open_tasks, running.done()) == (3, False)
            anna, _ = store.register("anna")
            given = store.next_task(anna)
            assert given is not None
            receipt = store.submit(anna, given.task_id, Judgment("k", choice="a"), lease_id=given.lease_id)
            await running
    assert store.totals().open_tasks == 3
    assert receipt.weights_version_a == receipt.weights_version_b == int(receipt.weights_version_a or 0) >= 1
    assert bodies[0] == {
        "model": "policy",
        "messages": [{"role": "user", "content": "Why?"}],
        "n": 2,
        "temperature": 0.7,
        "max_tokens": 9,
    }
    assert [body["messages"][0]["content"] for body in bodies] == ["Why?", "How?", "Why?", "How?"]
    assert {key for _, key in asked} == {"Bearer hr-key"}


async def test_a_policy_that_does_not_answer_is_named_once_and_asked_again(store: Store, prompts: Path) -> None:
    events: list[Event] = []
    failing = iter([(401, {"error": {"message": "send a key"}}), (200, {"data": []}), (200, {"data": [{"id": "m"}]})])
    said = iter([chat("same", "same "), (200, "no"), chat("one", "two"), chat("three", "four")])

    def answers(path: str, body: dict[str, Any]) -> Answer:
        return next(failing, (200, {"data": [{"id": "m"}]})) if path == "/v1/models" else next(said)

    with policy(answers) as (url, _):
        live = LivePolicy(url=url, prompts=prompts, ahead=9, max_pairs=2)
        async with asyncio.timeout(30):
            await LivePairs(live, store, required_votes=1, on_event=events.append, pause_s=0.01).keep_open()
    assert store.totals().open_tasks == 2
    assert [event.who for event in events] == [f"the policy at {url}"]
    assert "401" in events[0].cause
    assert "send a key" in events[0].cause
