"""What is opened is a store of this version, or refused and left alone."""

import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import create_mock_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from contracts.disk import DiskFull
from feedback.simulate import Pair
from feedback.store import Refused, Store
from feedback.store.schema import STORE_SCHEMA_VERSION, metadata
from tests.small_disk import MIB, small_disk


def refusal(place: object) -> Refused:
    with pytest.raises(Refused) as error:
        Store(place)  # type: ignore[arg-type]
    return error.value


def run(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


def test_what_was_written_is_there_after_opening_again(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "feedback.db"
    with Store(path) as store:
        anna, token = store.register("anna")
    with Store(f"sqlite:///{path}") as store:
        assert store.authenticate(token) == anna


def test_commits_are_synced_to_a_write_ahead_log(tmp_path: Path):
    with Store(tmp_path / "feedback.db") as store, store._database.writer.begin() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}


@pytest.mark.parametrize("version", [STORE_SCHEMA_VERSION + 1, 0])
def test_another_schema_version_is_refused(tmp_path: Path, version: int):
    path = tmp_path / "feedback.db"
    Store(path).close()
    run(path, f"UPDATE meta SET value = '{version}'")
    refused = refusal(path)
    assert refused.code == "schema"
    assert f"has store schema {version}, this Headrace reads {STORE_SCHEMA_VERSION}" in str(refused)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("ALTER TABLE judgments ADD COLUMN mood TEXT", "table judgments is not that of store schema 1: mood"),
        ("DROP TABLE gaps", "table gaps is not"),
    ],
)
def test_altered_tables_are_refused(tmp_path: Path, change: str, named: str):
    path = tmp_path / "feedback.db"
    Store(path).close()
    run(path, change)
    refused = refusal(path)
    assert (refused.code, named in str(refused)) == ("schema", True)


def test_what_is_no_store_is_refused(tmp_path: Path):
    (tmp_path / "text.db").write_text("no database " * 100)
    run(tmp_path / "other.db", "CREATE TABLE votes (id INTEGER)")
    before = (tmp_path / "other.db").read_bytes()
    places = [tmp_path / "text.db", tmp_path / "other.db", tmp_path, "sqlite://", "://", "sqlite:///:memory:"]
    assert [refusal(place).code for place in places] == ["not_a_store"] * len(places)
    assert "holds other tables and no store (votes)" in str(refusal(tmp_path / "other.db"))
    assert sqlite3.connect(tmp_path / "other.db").execute("SELECT name FROM sqlite_master").fetchall() == [("votes",)]
    assert len(before) > 0


def test_eight_open_a_new_file_at_once(tmp_path: Path):
    barrier, ids = threading.Barrier(8), []

    def open_it(number: int) -> None:
        barrier.wait(30)
        with Store(tmp_path / "feedback.db") as store:
            ids.append(store.register(f"n{number}")[0])

    threads = [threading.Thread(target=open_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ids) == list(range(1, 9))


def test_a_full_disk_is_named_and_takes_nothing(tmp_path: Path):
    with small_disk(tmp_path / "disk", 4 * MIB) as disk, Store(disk.folder / "feedback.db") as store:
        pairs = [Pair(f"q{n}", "", "x" * 1000 + str(n), "a" * 500, "b" * 500) for n in range(500)]
        disk.fill(leave_bytes=200_000)
        with pytest.raises(DiskFull, match="are free on the disk"):
            store.add_pairs(pairs, source="file", required_votes=1)
        disk.empty()
        assert store.add_pairs(pairs, source="file", required_votes=1).kept == 500


def test_postgresql_would_understand_the_tables():
    statements = []
    engine = create_mock_engine("postgresql://", lambda statement, *_: statements.append(statement))
    metadata.create_all(engine, checkfirst=False)
    made = [str(statement.compile(dialect=postgresql.dialect())) for statement in statements]
    assert sum(isinstance(statement, CreateTable) for statement in statements) == len(metadata.tables)
    assert sum(isinstance(statement, CreateIndex) for statement in statements) == 4
    judgments = next(text for text in made if "CREATE TABLE judgments" in text)
    assert "id BIGSERIAL NOT NULL" in judgments
    assert "WHERE gold IS NOT NULL" in "".join(made)
