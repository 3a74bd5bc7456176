"""A store in a real file, and in a real PostgreSQL where there is one; its clock in the test's hands."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from feedback.store import Assignment, Judgment, Store
from tests.postgresql import Server


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new store may be."""
    if request.param == "sqlite":
        return str(tmp_path / "feedback.db")
    server: Server = request.getfixturevalue("postgresql_server")
    return server.new_database()


@pytest.fixture
def store(place: str, clock: Clock) -> Iterator[Store]:
    with Store(place, now=clock, seed=1) as opened:
        yield opened


@pytest.fixture
def pair(store: Store) -> Callable[..., str]:
    """Adds a pair task about a prompt of its own: a by weights version 3, b by version 4."""

    def add(number: int = 0, **options: object) -> str:
        prompt = store.add_prompt(f"question {number}", name=f"p{number}", domain="chat")
        a = store.add_response(prompt, f"first {number}", source="versions", weights_version=3, sampling={"top_p": 1})
        b = store.add_response(prompt, f"second {number}", source="versions", weights_version=4)
        return store.add_task("pair", a, b, **options)  # type: ignore[arg-type]

    return add


@pytest.fixture
def person(store: Store) -> int:
    return store.register("anna")[0]


def vote(store: Store, annotator_id: int, given: Assignment, key: str, choice: str = "a", **more: object) -> int:
    judgment = Judgment(key, choice=choice, **more)  # type: ignore[arg-type]
    return store.submit(annotator_id, given.task_id, judgment, lease_id=given.lease_id).judgment_id
