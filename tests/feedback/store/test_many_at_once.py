"""Many writers, killed ones, and every order of events that hypothesis thinks of."""

import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from feedback.simulate import Pair
from feedback.store import Assignment, Judgment, Refused, Store
from tests.feedback.store.conftest import Clock

ROOT = Path(__file__).parents[3]
TASKS, REQUIRED = 12, 3

# Votes on all that it gets; prints a vote when it was acknowledged.
WRITER = """
import sys
from feedback.store import Judgment, Store
store, annotator = Store(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while given := store.next_task(annotator):
    receipt = store.submit(annotator, given.task_id, Judgment(given.lease_id, choice="a"), lease_id=given.lease_id)
    print(receipt.judgment_id, given.task_id, given.left, flush=True)
"""


def some_pairs(count: int) -> list[Pair]:
    return [Pair(f"q{number:03d}", "", f"question {number}", "x", "y") for number in range(count)]


def start(place: str, annotator: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, place, str(annotator)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def acknowledged(lines: list[str]) -> dict[int, tuple[str, str]]:
    """By judgment id: task and side. The last line may have been cut off by the kill."""
    whole = [line.split() for line in lines if line.endswith("\n") and line != "ready\n"]
    return {int(number): (task, left) for number, task, left in whole}


def test_kill_9_loses_nothing_that_was_acknowledged(place: str):
    rng = random.Random(5)
    with Store(place) as store:
        store.add_pairs(some_pairs(3000), source="file", required_votes=1)
        people = [store.register(f"n{number}")[0] for number in range(4)]
        for annotator in people:
            writer = start(place, annotator)
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(1 + rng.randrange(1, 30))]
            time.sleep(rng.random() / 20)
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()
            assert writer.wait(30) == -signal.SIGKILL
            writer.stdout.close()
            told = acknowledged(lines)
            rows = store.export_annotator(annotator)["judgments"]
            kept = {row["id"]: (row["task_id"], row["shown_left"]) for row in rows}
            assert len(told) >= len(lines) - 2
            assert told.items() <= kept.items()
            assert len(kept) <= len(told) + 1  # one was on disk and not yet told
            assert store.progress(annotator).voted == len(kept)
    with Store(place) as store:
        assert store.progress(people[0]).votes == sum(len(store.export_annotator(p)["judgments"]) for p in people)


def test_eight_processes_and_threads_share_the_work(place: str):
    with Store(place) as store:
        store.add_pairs(some_pairs(TASKS), source="file", required_votes=REQUIRED)
        people = [store.register(f"n{number}")[0] for number in range(8)]
        told: dict[int, dict[int, tuple[str, str]]] = {annotator: {} for annotator in people}

        def work(annotator: int) -> None:
            while given := store.next_task(annotator):
                judgment = Judgment(given.lease_id, choice="a")
                receipt = store.submit(annotator, given.task_id, judgment, lease_id=given.lease_id)
                told[annotator][receipt.judgment_id] = (given.task_id, str(given.left))

        writers = [start(place, annotator) for annotator in people[:3]]
        threads = [threading.Thread(target=work, args=(annotator,)) for annotator in people[3:]]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for thread in threads:
            thread.start()
        for annotator, writer in zip(people, writers, strict=False):
            assert writer.stdout is not None
            told[annotator] = acknowledged(writer.stdout.readlines())
            assert writer.wait(120) == 0
            writer.stdout.close()
        for thread in threads:
            thread.join(120)
        # A place whose holder looked for a next task while others held the rest is free only when they are done.
        for annotator in people:
            work(annotator)
        per_task = Counter(task for said in told.values() for task, _ in said.values())
        assert per_task == {pair.pair_id: REQUIRED for pair in some_pairs(TASKS)}
        for annotator in people:
            rows = store.export_annotator(annotator)["judgments"]
            assert {row["id"]: (row["task_id"], row["shown_left"]) for row in rows} == told[annotator]
            assert len({task for task, _ in told[annotator].values()}) == len(told[annotator])


def test_one_vote_sent_eight_times_at_once_is_one(place: str):
    with Store(place) as store:
        store.add_pairs(some_pairs(2), source="file", required_votes=5)
        anna, _ = store.register("anna")
        given = store.next_task(anna)
        assert given is not None
        barrier = threading.Barrier(8)
        results: list[tuple[object, object]] = []

        def send(key: str) -> None:
            barrier.wait(30)
            try:
                judgment = Judgment(key, choice="b")
                receipt = store.submit(anna, given.task_id, judgment, lease_id=given.lease_id)
                results.append((receipt.judgment_id, receipt.repeated))
            except Refused as refused:
                results.append((refused.code, key))

        threads = [threading.Thread(target=send, args=("same" if n < 4 else f"other {n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        (row,) = store.export_annotator(anna)["judgments"]
        assert len(results) == 8
        assert (row["id"], False) in results
        assert results.count((row["id"], True)) == (3 if row["idempotency_key"] == "same" else 0)
        assert {result[0] for result in results} <= {row["id"], "lease_ended", "already_voted"}
        assert store.progress(anna).votes == 1


def test_a_writer_that_waits_too_long_is_told_so(tmp_path: Path):
    path = tmp_path / "feedback.db"
    with Store(path) as store, Store(path, busy_s=0.1) as hasty:
        with store._database.writer.begin(), pytest.raises(Refused) as error:
            hasty.register("anna")
        assert error.value.code == "busy"
        hasty.register("anna")


class Panel(RuleBasedStateMachine):
    """Three annotators, four tasks of two votes, a gold check; the model is dictionaries.

    What is drawn from them is drawn in the order in which it came: lease ids are random, no order of theirs repeats.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="hr-store-")
        self.clock = Clock()
        self.store = Store(Path(self.folder.name) / "feedback.db", now=self.clock, seed=3)
        pairs = some_pairs(4)
        self.store.add_pairs(pairs, source="file", required_votes=2)
        prompt = self.store.add_prompt("gold")
        a, b = (self.store.add_response(prompt, text, source="file") for text in "ab")
        self.gold = self.store.add_task("pair", a, b, gold="a")
        self.people = [self.store.register(name)[0] for name in ("anna", "ben", "cora")]
        self.leases: dict[str, tuple[int, Assignment]] = {}  # live or over
        self.ended: set[str] = set()
        self.standing: dict[tuple[int, str], tuple[int, str, str | None]] = {}  # id, choice, left
        self.rows = 0
        self.keys = 0

    def live(self, annotator: int | None = None) -> list[tuple[int, Assignment]]:
        return [
            (who, given)
            for who, given in self.leases.values()
            if given.lease_id not in self.ended
            and given.deadline_s > self.clock.now
            and (annotator is None or who == annotator)
        ]

    def votes(self, task: str) -> int:
        return sum(t == task and choice != "skip" for (_, t), (_, choice, _) in self.standing.items())

    @rule(who=st.integers(0, 2), rate=st.sampled_from([0.0, 0.5]))
    def ask(self, who: int, rate: float) -> None:
        annotator = self.people[who]
        held = self.live(annotator)
        given = self.store.next_task(annotator, lease_s=50, gold_rate=rate)
        if held:
            assert given in [one for _, one in held]
        elif given is None:
            for pair in some_pairs(4):
                places = sum(one.task_id == pair.pair_id for _, one in self.live())
                assert self.votes(pair.pair_id) + places >= 2 or (annotator, pair.pair_id) in self.standing
        else:
            assert (annotator, given.task_id) not in self.standing
            self.leases[given.lease_id] = (annotator, given)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), choice=st.sampled_from(["a", "b", "tie", "both_bad", "skip"]), someone=st.booleans())
    def answer(self, data: st.DataObject, choice: str, someone: bool) -> None:
        holder, given = self.leases[data.draw(st.sampled_from(list(self.leases)))]
        annotator = data.draw(st.sampled_from(self.people)) if someone else holder
        self.keys += 1
        judgment = Judgment(f"k{self.keys}", choice=choice)
        ok = (annotator, given) in self.live() and (annotator, given.task_id) not in self.standing
        try:
            receipt = self.store.submit(annotator, given.task_id, judgment, lease_id=given.lease_id)
        except Refused:
            assert not ok
            return
        assert ok
        self.rows += 1
        self.ended.add(given.lease_id)
        self.standing[annotator, given.task_id] = (receipt.judgment_id, choice, given.left)
        assert self.store.submit(annotator, given.task_id, judgment, lease_id=given.lease_id).repeated

    @precondition(lambda self: self.standing)
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        annotator, task = data.draw(st.sampled_from(list(self.standing)))
        judgment_id, _, _ = self.standing.pop((annotator, task))
        self.keys += 1
        given = self.store.undo(annotator, judgment_id, idempotency_key=f"k{self.keys}", lease_s=50)
        assert given is not None
        assert given.task_id == task
        self.leases[given.lease_id] = (annotator, given)
        self.rows += 1

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        who, given = data.draw(st.sampled_from(self.live()))
        self.store.release(who, given.lease_id)
        self.ended.add(given.lease_id)

    @rule(seconds=st.sampled_from([1, 30, 60]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def adds_up(self) -> None:
        ballots = self.store.ballots()
        counted = {
            (ballots.voters[v], ballots.pair_ids[p], int(c))
            for v, p, c in zip(ballots.voters_N, ballots.pairs_N, ballots.choices_N, strict=True)
        }
        names = dict(zip(self.people, ("anna", "ben", "cora"), strict=True))
        codes = ("a", "b", "tie", "both_bad")
        assert counted == {
            (names[who], task, codes.index(choice))
            for (who, task), (_, choice, _) in self.standing.items()
            if choice != "skip"
        }
        for pair in some_pairs(4):
            places = sum(one.task_id == pair.pair_id for _, one in self.live())
            assert self.votes(pair.pair_id) + places <= 2
        progress = self.store.progress(self.people[0])
        assert progress.votes == sum(self.votes(pair.pair_id) for pair in some_pairs(4))
        assert progress.open_tasks == sum(self.votes(pair.pair_id) < 2 for pair in some_pairs(4))

    def teardown(self) -> None:
        assert sum(len(self.store.export_annotator(person)["judgments"]) for person in self.people) == self.rows
        self.store.close()
        self.folder.cleanup()


TestPanel = Panel.TestCase
TestPanel.settings = settings(max_examples=12, stateful_step_count=25, deadline=None, derandomize=True)
