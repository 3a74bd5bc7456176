"""`headrace annotator` and `headrace preferences`, by their real command line, without Ray."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from contracts.config import ConfigError
from feedback.formats import read_preferences, read_unpaired
from feedback.simulate import Pair
from feedback.store import Judgment, Store

Run = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The line that a person reads instead of a result."""
    error = run(*arguments).exception
    assert isinstance(error, ConfigError), error
    return str(error)


def labelled(place: Path, choices: dict[str, list[str]]) -> None:
    """Votes of as many people as there are, on the pairs by name."""
    with Store(place) as store:
        store.add_pairs(
            [Pair(name, "", f"question {name}", "good", "bad") for name in choices], source="file", required_votes=9
        )
        for number in range(max(map(len, choices.values()))):
            annotator = store.person(f"person {number}")
            while given := store.next_task(annotator):
                said = choices[given.task_id]
                choice = said[number] if number < len(said) else "skip"
                key = Judgment(given.task_id, choice=choice)
                store.submit(annotator, given.task_id, key, lease_id=given.lease_id)


def test_a_token_is_printed_once_and_signs_in(place: Path) -> None:
    made = run("annotator", "anna", "--store", place, "--url", "http://127.0.0.1:8001/")
    token, link = made.stdout.split()
    assert link == f"http://127.0.0.1:8001/#token={token}"
    assert token.encode() not in place.read_bytes()
    with Store(place) as store:
        assert store.authenticate(token) == store.find("anna")
    assert "--new-token gives them another token" in refused("annotator", "anna", "--store", place)
    other = run("annotator", "anna", "--store", place, "--new-token").stdout.strip()
    with Store(place) as store:
        assert store.authenticate(other) == store.find("anna")
        with pytest.raises(ValueError, match="the token is nobody's"):
            store.authenticate(token)


def test_everybody_is_listed_exported_and_deleted(place: Path, tmp_path: Path) -> None:
    labelled(place, {"q0": ["a", "b"], "q1": ["a"]})
    assert run("annotator", "--store", place).stdout.splitlines() == [
        "person 0: 2 votes, 0 of 0 gold checks right, no token",
        "person 1: 2 votes, 0 of 0 gold checks right, no token",
    ]
    run("annotator", "person 0", "--store", place, "--deactivate")
    assert ", deactivated" in run("annotator", "--store", place).stdout
    run("annotator", "person 0", "--store", place, "--export", tmp_path / "data.json")
    assert len(json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))["judgments"]) == 2
    assert "File exists" in refused("annotator", "person 0", "--store", place, "--export", tmp_path / "data.json")
    assert run("annotator", "person 0", "--store", place, "--delete").stdout == (
        "deleted 'person 0': 2 judgments on 2 tasks\n"
    )
    assert "there is no annotator 'person 0'" in refused("annotator", "person 0", "--store", place, "--delete")


def test_votes_become_a_preference_file(place: Path, tmp_path: Path) -> None:
    labelled(place, {"q0": ["a", "a", "a"], "q1": ["b", "b", "a"], "q2": ["both_bad", "both_bad", "a"], "q3": ["a"]})
    said = run("preferences", place, "--to", tmp_path / "out.parquet", "--min-votes", 2, "--method", "majority")
    assert said.stdout.startswith(f"wrote 3 rows to {tmp_path / 'out.parquet'}, of 10 votes on 4 tasks; dataset"), said
    assert said.stdout.endswith("version 1; left out: few votes 1\n")
    rows, _ = read_preferences(tmp_path / "out.parquet")
    assert {row.prompt: row.chosen for row in rows if row.prompt != "question q2"} == {
        "question q0": "good",
        "question q1": "bad",
    }
    run("preferences", place, "--to", tmp_path / "bad.jsonl", "--unpaired")
    labels, _ = read_unpaired(tmp_path / "bad.jsonl")
    assert [(label.prompt, label.response, label.good) for label in labels] == [
        ("question q2", "good", False),
        ("question q2", "bad", False),
    ]


def test_what_cannot_be_done_says_why_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    assert refused("preferences", place, "--to", tmp_path / "x.jsonl") == f"FILE_OR_URL: there is no store {place}"
    assert not place.exists()
    with Store(place):
        pass
    assert "holds no votes of kind label" in refused(
        "preferences", place, "--to", tmp_path / "x.jsonl", "--kind", "label"
    )
    assert "written are .parquet" in refused("preferences", place, "--to", tmp_path / "x.csv")
    assert list(tmp_path.glob("x.*")) == []
    (tmp_path / "other.txt").write_text("no database", encoding="utf-8")
    assert "is no database of ours" in refused("annotator", "--store", tmp_path / "other.txt")
    assert "give one of them" in refused("annotator", "anna", "--store", place, "--delete", "--deactivate")
    assert "--delete: needs the NAME" in refused("annotator", "--store", place, "--delete")
