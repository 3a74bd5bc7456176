"""A store with tasks and people, and the labelling app in front of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from contracts.labelling import LabellingConfig
from feedback.store import Store
from serving.labelling import labelling_app

HOSTILE = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'> & \u202e \U0001f600"


@dataclass
class Annotator:
    """One person at the API."""

    client: TestClient
    annotator_id: int
    token: str

    def send(self, method: str, path: str, body: object = None) -> tuple[int, dict]:
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = self.client.request(method, f"/api/{path}", json=body, headers=headers)
        return answer.status_code, answer.json()

    def next(self) -> dict:
        status, found = self.send("POST", "next")
        assert status == 200
        return found["task"]

    def vote(self, task: dict, key: str = "k", **said: object) -> tuple[int, dict]:
        body = {"task_id": task["task_id"], "lease_id": task["lease_id"], "idempotency_key": key, **said}
        return self.send("POST", "judgments", body)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


@pytest.fixture
def store(place: Path) -> Iterator[Store]:
    with Store(place, seed=1) as opened:
        yield opened


@pytest.fixture
def pair(store: Store) -> Callable[..., str]:
    """Adds a pair task of a prompt of its own: a by weights version 3, b by version 4."""

    def add(number: int = 0, *, a: str = "", b: str = "", **options: object) -> str:
        prompt = store.add_prompt(f"question {number}", name=f"p{number}")
        first = store.add_response(prompt, a or f"first {number}", source="versions", weights_version=3)
        second = store.add_response(prompt, b or f"second {number}", source="versions", weights_version=4)
        return store.add_task("pair", first, second, **options)  # type: ignore[arg-type]

    return add


@pytest.fixture
def client(place: Path) -> Iterator[TestClient]:
    config = LabellingConfig(store=str(place), gold_rate=0.0, max_body_bytes=20_000)
    with TestClient(labelling_app(config), raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture
def join(store: Store, client: TestClient) -> Callable[[str], Annotator]:
    def register(name: str) -> Annotator:
        return Annotator(client, *store.register(name))

    return register
