"""Simulated votes on their way through the store: nothing is lost or changed, and a killed attempt leaves none."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.asking import Question, _through_the_store
from contracts.preferences import SimulatedVotes
from feedback.quality import comparisons, dawid_skene
from feedback.simulate import Pair, simulate_votes

PANEL = SimulatedVotes.model_validate({"gold": "m:f", "votes_per_pair": 3})
PAIRS = [
    Pair(f"pair-{index:05d}", f"p{index}", f"Question {index}?", "yes", "yes " if index == 4 else f"no {index}", "d")
    for index in range(40)
]
GOLD_A = [float(index % 3) for index in range(40)]
GOLD_B = [1.0] * 40


def first_question(folder: Path) -> Question:
    return Question(1, 0, folder / "preferences.parquet")


def test_the_store_gives_what_the_votes_say(tmp_path: Path) -> None:
    votes = simulate_votes(PAIRS, GOLD_A, GOLD_B, PANEL, seed=3)
    found, aggregate = _through_the_store(tmp_path, PAIRS, votes, PANEL, first_question(tmp_path))
    asked = [pair for pair in PAIRS if pair.pair_id != "pair-00004"]
    direct = dawid_skene([vote for vote in votes if vote.pair_id != "pair-00004"])
    expected, _ = comparisons(asked, direct)
    assert [(row.prompt, row.chosen, row.rejected) for row in found.comparisons] == [
        (row.prompt, row.chosen, row.rejected) for row in expected
    ]
    assert [row.probability for row in found.comparisons] == pytest.approx([row.probability for row in expected])
    assert (found.pairs, found.votes, found.dropped) == (40, 39 * 3, {"identical": 1})
    assert found.voters == pytest.approx(direct.reliability)
    assert aggregate.probability_a.keys() == {pair.pair_id for pair in asked}
    assert pq.read_table(tmp_path / "preferences.parquet").num_rows == 39
    with sqlite3.connect(tmp_path / "simulated_votes.sqlite") as store:
        assert store.execute("select count(*) from judgments").fetchone() == (39 * 3,)


def test_votes_of_an_attempt_that_was_killed_do_not_count(tmp_path: Path) -> None:
    others = [Pair(pair.pair_id, "q", "Another?", "one", "two") for pair in PAIRS]
    question = first_question(tmp_path)
    _through_the_store(tmp_path, others, simulate_votes(others, GOLD_B, GOLD_A, PANEL, seed=1), PANEL, question)
    votes = simulate_votes(PAIRS, GOLD_A, GOLD_B, PANEL, seed=3)
    found, _ = _through_the_store(tmp_path, PAIRS, votes, PANEL, question)
    assert found.votes == 39 * 3
    assert {row.prompt for row in found.comparisons} == {pair.prompt for pair in PAIRS} - {"Question 4?"}


def test_what_no_database_takes_is_dropped_and_counted(tmp_path: Path) -> None:
    odd = [replace(PAIRS[0], response_b="a NUL: \0"), replace(PAIRS[1], response_a="half of one: \ud83d"), *PAIRS[2:]]
    votes = simulate_votes(odd, GOLD_A, GOLD_B, PANEL, seed=3)
    found, _ = _through_the_store(tmp_path, odd, votes, PANEL, first_question(tmp_path))
    assert (found.votes, found.dropped) == (37 * 3, {"identical": 1, "bad_text": 2})


def test_a_later_round_adds_to_what_was_said(tmp_path: Path) -> None:
    first = simulate_votes(PAIRS, GOLD_A, GOLD_B, PANEL, seed=3)
    _through_the_store(tmp_path, PAIRS, first, PANEL, first_question(tmp_path))
    later = [Pair(f"round-2-{pair.pair_id}", "q", f"Later {pair.prompt}", "one", "two") for pair in PAIRS]
    votes = simulate_votes(later, GOLD_B, GOLD_A, PANEL, seed=1)
    question = Question(2, 5, tmp_path / "rounds" / "round-02" / "preferences.parquet")
    found, aggregate = _through_the_store(tmp_path, later, votes, PANEL, question)
    assert (found.pairs, found.votes) == (40, (39 + 40) * 3)
    assert len(aggregate.probability_a) == 79
    assert pq.read_table(question.file).num_rows == len(found.comparisons) == 79
