"""From the store to probabilities, from these to files; and from files into the store, whole or not at all."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.config import ConfigError
from contracts.preferences import SimulatedVotes, VoterGroup
from contracts.records import Comparison
from feedback.formats import read_preferences, read_unpaired, write_preferences
from feedback.quality import dawid_skene, majority
from feedback.simulate import Pair, Vote, simulate_votes
from feedback.store import DatasetQuery, Judgment, Refused, Store
from feedback.store.schema import ROWS_AT_ONCE

ROOT = Path(__file__).parents[3]


def panel(pairs: list[Pair]) -> list[Vote]:
    voters = {"good": VoterGroup(count=8, accuracy=0.8), "bad": VoterGroup(count=2, accuracy=0.2)}
    config = SimulatedVotes(gold="examples.judges:vader", votes_per_pair=3, voters=voters)
    return simulate_votes(pairs, [float(n % 2) for n in range(len(pairs))], [0.5] * len(pairs), config, seed=0)


PAIRS = [Pair(f"q{n:03d}", f"p{n}", f"question {n}", f"a{n}", f"b{n}", "odd" if n % 2 else "even") for n in range(50)]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def everything(store: Store) -> list[int]:
    tables = ("prompts", "responses", "tasks", "judgments", "annotators", "aggregate_runs", "aggregates")
    with store._database.reader.begin() as connection:
        return [connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one() for table in tables]


def test_votes_through_the_store_say_what_they_say_without_it(store: Store):
    votes = panel(PAIRS)
    assert store.add_pairs(PAIRS, source="live", required_votes=0, weights_version=2).kept == len(PAIRS)
    assert store.add_votes(votes) == (len(votes), {})
    assert store.add_votes(votes[:5]) == (0, {"already_voted": 5})
    assert store.add_votes([Vote("gone", "x", "a", None)]) == (0, {"unknown_task": 1})
    for method, alone in (("dawid_skene", dawid_skene(votes)), ("majority", majority(votes))):
        run = store.aggregate(method=method)  # type: ignore[arg-type]
        assert store.probabilities(run.aggregate_id) == alone.probability_a
        assert (run.tasks, run.judgments, run.last_judgment_id) == (len(PAIRS), len(votes), len(votes))


def test_gold_answers_of_the_store_reach_the_aggregation(store: Store):
    prompt = store.add_prompt("p")
    a, b = (store.add_response(prompt, text, source="file") for text in "ab")
    task = store.add_task("pair", a, b, gold="b")
    store.add_votes([Vote(task, "x", "a", None)])
    assert store.probabilities(store.aggregate().aggregate_id) == {task: 0.0}
    assert store.gold_checks() == {"x": (0, 1)}


@pytest.mark.parametrize("layout", ["plain", "conversational"])
@pytest.mark.parametrize("name", ["set.parquet", "set.jsonl", "set.jsonl.gz", "set"])
def test_datasets_are_versions_of_a_content(store: Store, tmp_path: Path, name: str, layout: str):
    if name == "set":
        pytest.importorskip("datasets")
    store.add_pairs(PAIRS, source="live", required_votes=0)
    store.add_votes(panel(PAIRS))
    query = DatasetQuery(store.aggregate().aggregate_id, domain="odd", min_certainty=0.6)
    exported = store.export_preferences("odd ones", query, tmp_path / name, layout=layout)  # type: ignore[arg-type]
    kept, dropped = read_preferences(tmp_path / name)
    assert dropped == {}
    assert exported.rows == len(kept) == 25 - exported.dropped.get("uncertain", 0) > 15
    probability = store.probabilities(query.aggregate_id)
    by_id = {pair.prompt_id: pair for pair in PAIRS}
    for row in kept:
        pair = by_id[row.prompt_id]
        said = probability[pair.pair_id]
        better = (pair.response_a, pair.response_b) if said > 0.5 else (pair.response_b, pair.response_a)
        assert (row.prompt, row.chosen, row.rejected, row.domain) == (pair.prompt, *better, "odd")
        assert row.probability == max(said, 1 - said)
    # the hash is of the rows, not of the file; the same again is no new version
    again = store.export_preferences("odd ones", query, tmp_path / "again.jsonl")
    assert again == exported
    wider = store.export_preferences("odd ones", DatasetQuery(query.aggregate_id), tmp_path / "all.jsonl")
    assert (wider.version, wider.content_hash == exported.content_hash) == (2, False)
    assert store.dataset_versions("odd ones") == [exported, wider]


def test_labels_and_both_bad_become_unpaired_rows(store: Store, person: int, tmp_path: Path):
    prompt = store.add_prompt("p", name="id")
    texts = ("good one", "bad one")
    for text, value in zip(texts, (1, 0), strict=True):
        response = store.add_response(prompt, text, source="live", weights_version=1, response_id=text)
        store.judge_served(person, "thumbs", response, Judgment(f"t {text}", value=value))
    both = Judgment("b", choice="both_bad")
    store.judge_served(person, "pair", texts[0], both, other_response_id=texts[1])
    for kind, expected in (("thumbs", [(texts[0], True), (texts[1], False)]), ("pair", [(t, False) for t in texts])):
        query = DatasetQuery(store.aggregate(kind).aggregate_id)  # type: ignore[arg-type]
        for layout in ("plain", "conversational"):
            path = tmp_path / f"{kind}-{layout}.jsonl"
            store.export_unpaired(kind, query, path, layout=layout)
            labels, dropped = read_unpaired(path)
            assert dropped == {}
            assert sorted((label.response, label.good) for label in labels) == sorted(expected)
            assert {(label.prompt, label.votes, label.of_votes) for label in labels} == {("p", 1, 1)}
    with pytest.raises(Refused, match="is not one of pairs"):
        store.export_preferences("x", DatasetQuery(1), tmp_path / "x.jsonl")
    with pytest.raises(Refused, match="there is no aggregate 99"):
        store.export_preferences("x", DatasetQuery(99), tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_a_preference_file_becomes_tasks_and_an_aggregate(store: Store, person: int, tmp_path: Path):
    rows = [Comparison(f"p{n}", f"good {n}", f"bad {n}", f"id{n}", "chat", 0.75, 3, 1) for n in range(40)]
    write_preferences(rows, tmp_path / "set.parquet")
    report = store.import_preferences(tmp_path / "set.parquet", required_votes=1)
    assert (report.kept, report.known, report.dropped, report.rows) == (40, 0, {}, 40)
    assert report.aggregate_id is not None
    said = store.probabilities(report.aggregate_id)
    assert set(said.values()) == {0.25, 0.75}  # the chosen one is not always a
    given = store.next_task(person)
    assert given is not None
    assert given.response_a.startswith("good") == (said[given.task_id] == 0.75)
    store.export_preferences("back", DatasetQuery(report.aggregate_id), tmp_path / "back.parquet")
    key = Comparison.__hash__
    assert sorted(read_preferences(tmp_path / "back.parquet")[0], key=key) == sorted(rows, key=key)
    again = store.import_preferences(tmp_path / "set.parquet")
    assert (again.kept, again.known) == (0, 40)


def test_an_import_says_what_it_dropped(store: Store, tmp_path: Path):
    path = lines(
        tmp_path / "set.jsonl",
        {"prompt": "p", "chosen": "the same beginning, good", "rejected": "the same beginning, bad"},
        {"prompt": "p", "chosen": " ", "rejected": "y"},
        {"prompt": "p", "chosen": "x", "rejected": "x "},
        {"prompt": "p", "chosen": "x\0", "rejected": "y"},
        {"prompt": "p", "chosen": "x", "rejected": "y"},
        {"prompt": "p", "chosen": "x", "rejected": "y"},
    )
    report = store.import_preferences(path, truncate=lambda text: text[:10])
    assert (report.kept, report.known) == (1, 1)
    assert report.dropped == {"identical after truncation": 1, "empty": 1, "identical": 1, "bad_text": 1}
    labels = lines(
        tmp_path / "labels.jsonl",
        {"prompt": "p", "completion": "x", "label": True},
        {
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "y"}],
            "label": 0,
        },
        {"prompt": "p", "completion": "", "label": False},
    )
    report = store.import_unpaired(labels)
    assert (report.kept, report.dropped) == (2, {"empty": 1})
    assert report.aggregate_id is not None
    assert sorted(store.probabilities(report.aggregate_id).values()) == [0.0, 1.0]


FINE = {"prompt": "p", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    "wrong",
    ['{"prompt": ', {"prompt": "p", "chosen": "x"}, {**FINE, "chosen": 3}, {**FINE, "probability": "high"}],
)
def test_never_half_an_import(store: Store, tmp_path: Path, wrong: object):
    many = [{**FINE, "chosen": f"x{number}"} for number in range(ROWS_AT_ONCE + 5)]
    before = everything(store)
    with pytest.raises(ConfigError, match=rf"set\.jsonl:{ROWS_AT_ONCE + 6}: "):
        store.import_preferences(lines(tmp_path / "set.jsonl", *many, wrong))
    assert everything(store) == before


# Stops in the middle of a file, three chunks into its transaction.
IMPORTER = """
import sys, time
from feedback.store import Store
texts = 0
def truncate(text):
    global texts
    texts += 1
    if texts == 2 * 6500:
        print("half", flush=True)
        time.sleep(600)
    return text
Store(sys.argv[1]).import_preferences(sys.argv[2], truncate=truncate)
"""


def test_an_import_that_is_killed_leaves_nothing_and_holds_nobody_up(store: Store, place: str, tmp_path: Path):
    rows = [{"prompt": f"p{number}", "chosen": f"x{number}", "rejected": "y"} for number in range(10_000)]
    path = lines(tmp_path / "set.jsonl", *rows)
    store.import_preferences(lines(tmp_path / "first.jsonl", FINE))
    before = everything(store)
    command = [sys.executable, "-c", IMPORTER, place, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as importer:
        assert importer.stdout is not None
        assert importer.stdout.readline() == "half\n"
        importer.kill()
    assert everything(store) == before
    report = store.import_preferences(path)
    assert (report.kept, report.known, report.dropped) == (10_000, 0, {})
    more = (10_000, 20_000, 10_000, 0, 0, 1, 10_000)
    assert everything(store) == [count + new for count, new in zip(before, more, strict=True)]


def test_files_of_another_kind_change_nothing(store: Store, tmp_path: Path):
    before = everything(store)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "\xfc"}'.encode("latin-1"))
    pq.write_table(pa.table({"prompt": ["p"], "chosen": ["x"]}), tmp_path / "missing.parquet")
    for name in ("latin.jsonl", "missing.parquet", "gone.jsonl", "set.csv"):
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            store.import_preferences(tmp_path / name)
    for label in (2, "yes", None, 0.0):
        with pytest.raises(ConfigError, match="'label' is"):
            store.import_unpaired(lines(tmp_path / "x.jsonl", {"prompt": "p", "completion": "x", "label": label}))
    assert everything(store) == before


def test_votes_from_a_file_are_checked_one_by_one(store: Store, pair: Callable[..., str], tmp_path: Path):
    task, other = pair(0, required_votes=2), pair(1)
    anna, _ = store.register("anna")
    good = {"task_id": task, "voter": "anna", "choice": "a", "left": "b", "active_s": 4.5, "created_s": 999_999.0}
    rows = [
        good,
        {**good, "choice": "b"},
        {**good, "voter": "ben", "choice": "left"},
        {**good, "voter": "ben", "task_id": "gone"},
        {**good, "voter": "ben", "created_s": 1_000_001.0},
        {**good, "voter": "ben", "created_s": "yesterday"},
        {**good, "voter": "ben", "active_s": 10**400},
        {**good, "voter": "ben", "choice": ["a"]},
        {**good, "voter": "ben", "active_s": -1},
        {**good, "voter": "ben", "left": "up"},
        {**good, "voter": " "},
        {"task_id": other, "voter": "ben", "choice": "skip"},
    ]
    report = store.import_votes(lines(tmp_path / "votes.jsonl", *rows), voters="crowd")
    assert (report.kept, report.rows) == (2, len(rows))
    assert report.dropped == {"already_voted": 1, "bad_choice": 3, "unknown_task": 1, "bad_time": 4, "bad_text": 1}
    ballots = store.ballots()
    assert (ballots.voters, ballots.left_N.tolist(), ballots.active_s_N.tolist()) == (["crowd:anna"], [-1.0], [4.5])
    assert store.progress(anna).voted == 0  # the file's anna is not ours
    assert store.progress(anna).votes == 1
    before = everything(store)
    for wrong in ({**good, "voter": 3}, {"voter": "ben"}, "[]"):
        with pytest.raises(ConfigError, match=r"votes\.jsonl:2: "):
            store.import_votes(lines(tmp_path / "votes.jsonl", {**good, "voter": "cora"}, wrong), voters="crowd")
    assert everything(store) == before
