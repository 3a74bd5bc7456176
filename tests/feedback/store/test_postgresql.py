"""The store in a PostgreSQL: what its own locks and its own deaths do. Everything else is in the other tests."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from feedback.simulate import Pair
from feedback.store import Judgment, Refused, Store
from feedback.store.schema import annotators, judgments
from tests.feedback.store.test_many_at_once import WRITER, some_pairs
from tests.postgresql import Server

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture
def url(postgresql_server: Server) -> str:
    return postgresql_server.new_database()


def test_who_opens_a_new_database_at_the_same_time_finds_the_same_tables(url: str) -> None:
    barrier, found = threading.Barrier(6), []

    def opening() -> None:
        barrier.wait(30)
        with Store(url) as store:
            found.append(store.add_prompt("the same"))

    threads = [threading.Thread(target=opening) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len(set(found)) == 1


def test_the_last_place_is_given_to_one(url: str) -> None:
    """Many ask at once for few places: votes and leases of a task never exceed what it requires."""
    with Store(url) as store:
        store.add_pairs(some_pairs(6), source="file", required_votes=1)
        people = [store.register(f"n{number}")[0] for number in range(12)]
        barrier, given = threading.Barrier(len(people)), []

        def ask(annotator: int) -> None:
            barrier.wait(30)
            given.append(store.next_task(annotator))

        threads = [threading.Thread(target=ask, args=(annotator,)) for annotator in people]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(given) == len(people)
    assert sorted(one.task_id for one in given if one) == [pair.pair_id for pair in some_pairs(6)]


def test_a_lock_that_is_held_for_too_long_is_busy(url: str) -> None:
    with Store(url) as store, Store(url, busy_s=0.2) as hasty:
        anna, _ = store.register("anna")
        store.add_pairs(some_pairs(1), source="file", required_votes=1)
        with store._database.writer.begin() as connection:
            connection.execute(annotators.update().values(active=True))
            with pytest.raises(Refused) as error:
                hasty.next_task(anna)
        assert error.value.code == "busy"
        assert hasty.next_task(anna) is not None


def test_a_vote_and_a_deletion_that_need_each_others_rows_both_end(url: str) -> None:
    with Store(url) as store:
        store.add_pairs(some_pairs(60), source="file", required_votes=2)
        anna, ben = (store.register(name)[0] for name in ("anna", "ben"))
        failures: list[BaseException] = []

        def vote(annotator: int) -> None:
            try:
                while given := store.next_task(annotator):
                    judgment = Judgment(given.lease_id, choice="a")
                    store.submit(annotator, given.task_id, judgment, lease_id=given.lease_id)
            except Refused as refused:
                if refused.code not in ("unknown_annotator", "no_lease"):  # both are true of who was deleted
                    failures.append(refused)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=vote, args=(annotator,)) for annotator in (anna, ben)]
        for thread in threads:
            thread.start()
        while store.totals().votes < 20:
            pass
        gap = store.delete_annotator(anna)
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert gap.votes > 0
        votes = len(store.export_annotator(ben)["judgments"])
        assert (votes, store.totals().votes) == (60, 60)


def test_a_server_that_dies_keeps_what_it_acknowledged(postgresql_server: Server, url: str) -> None:
    with Store(url) as store:
        store.add_pairs(some_pairs(3000), source="file", required_votes=1)
        anna, _ = store.register("anna")
        command = [sys.executable, "-c", WRITER, url, str(anna)]
        writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(20)]
        postgresql_server.stop("immediate")
        lines += writer.stdout.readlines()
        writer.stdout.close()
        assert writer.wait(60) == 1
        with pytest.raises(Refused) as error:
            store.register("ben")
        assert error.value.code == "busy"
        postgresql_server.start()
        told = {int(line.split()[0]) for line in lines[1:] if line.endswith("\n")}
        kept = {row["id"] for row in store.export_annotator(anna)["judgments"]}
        assert len(told) >= 19
        assert told <= kept
        assert len(kept) <= len(told) + 1


def test_judgments_are_only_added(url: str) -> None:
    with Store(url) as store:
        store.add_pairs([Pair("q", "", "question", "x", "y")], source="file", required_votes=1)
        anna, _ = store.register("anna")
        for number in range(3):
            given = store.next_task(anna)
            assert given is not None
            said = store.submit(anna, "q", Judgment(f"v{number}", choice="a"), lease_id=given.lease_id)
            store.undo(anna, said.judgment_id, idempotency_key=f"u{number}")
        with store._database.reader.begin() as connection:
            rows = connection.execute(judgments.select().order_by(judgments.c.id)).all()
    assert [(row.act, row.revision, row.idempotency_key) for row in rows] == [
        ("vote", 0, "v0"), ("undo", 1, "u0"), ("vote", 2, "v1"),
        ("undo", 3, "u1"), ("vote", 4, "v2"), ("undo", 5, "u2"),
    ]  # fmt: skip
    assert [row.supersedes for row in rows] == [None, *(row.id for row in rows[:-1])]


def test_a_server_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Refused) as error:
        Store(f"postgresql+psycopg://somebody:secret@/none?host={tmp_path}")
    assert error.value.code == "not_a_store"
    assert "cannot be opened" in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
