"""Votes as arrays: what counts, what does not, what is refused."""

import math

import numpy as np
import pyarrow as pa
import pytest

from feedback.ballots import CHOICES, Ballots
from feedback.simulate import Vote


def rows(ballots: Ballots) -> list[tuple[str, str, str, float, float]]:
    return [
        (ballots.pair_ids[pair], ballots.voters[voter], CHOICES[choice], left, seconds)
        for pair, voter, choice, left, seconds in zip(
            ballots.pairs_N.tolist(),
            ballots.voters_N.tolist(),
            ballots.choices_N.tolist(),
            ballots.left_N.tolist(),
            ballots.active_s_N.tolist(),
            strict=True,
        )
    ]


def test_records_become_columns():
    votes = [Vote("y", "bob", "both_bad", "b", 2.5), Vote("x", "cy", "a", "a", 1.0), Vote("y", "ann", "b", "a", 3.0)]
    assert rows(Ballots.of(votes)) == [
        ("x", "cy", "a", 1.0, 1.0),
        ("y", "ann", "b", 1.0, 3.0),
        ("y", "bob", "both_bad", -1.0, 2.5),
    ]


def test_lists_numpy_and_arrow_are_the_same():
    columns = (["x", "x", "y"], ["ann", "bob", "ann"], ["a", "tie", "b"])
    expected = rows(Ballots.from_columns(*columns, left=["a", "b", "a"], active_s=[1, 2, 3]))
    arrays = [np.array(column) for column in columns]
    assert rows(Ballots.from_columns(*arrays, left=np.array(["a", "b", "a"]), active_s=np.array([1, 2, 3]))) == expected
    arrow = [pa.chunked_array([column[:1], column[1:]]) for column in columns]
    left, seconds = pa.array(["a", "b", "a"]), pa.chunked_array([[1, 2], [3]])
    assert rows(Ballots.from_columns(*arrow, left=left, active_s=seconds)) == expected


def test_the_last_vote_of_a_voter_on_a_pair_stands_and_a_skip_takes_it_back():
    ballots = Ballots.from_columns(
        ["x", "x", "x", "y", "y", "z"], ["ann", "bob", "ann", "ann", "ann", "eve"], ["a", "b", "b", "a", "skip", "skip"]
    )
    assert [row[:3] for row in rows(ballots)] == [("x", "ann", "b"), ("x", "bob", "b")]
    # who only skipped is no voter, and what was only skipped has no votes
    assert (ballots.pair_ids, ballots.voters) == (["x"], ["ann", "bob"])


def test_what_nobody_knows():
    ballots = Ballots.from_columns(["x", "y"], ["ann", "ann"], ["a", "b"], left=[None, "b"], active_s=[None, 4.0])
    assert ballots.left_N.tolist() == [0.0, -1.0]
    assert math.isnan(ballots.active_s_N[0])
    assert ballots.active_s_N[1] == 4.0
    assert Ballots.from_columns(["x"], ["ann"], ["a"]).left_N.tolist() == [0.0]


def test_no_votes():
    ballots = Ballots.of([])
    assert (ballots.pair_ids, ballots.voters, len(ballots.pairs_N)) == ([], [], 0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"choices": ["a", "c"]}, "choices has 'c', allowed is a, b, tie, both_bad, skip"),
        ({"choices": ["a", None]}, "choices: 1 rows have none"),
        ({"voters": ["ann"]}, "voters has 1 rows, pair_ids 2"),
        ({"voters": ["ann", 3]}, "voters: strings are needed"),
        ({"left": ["a", "left"]}, "left has 'left', allowed is a, b"),
        ({"active_s": [1.0, -2.0]}, "active_s has -2.0, allowed is 0 or more"),
    ],
)
def test_bad_columns_are_named(columns: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Ballots.from_columns(**{"pair_ids": ["x", "y"], "voters": ["ann", "bob"], "choices": ["a", "b"], **columns})
