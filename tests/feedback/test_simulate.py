"""The panel of simulated voters: balanced, seeded, as accurate as its groups say."""

from collections import Counter
from itertools import groupby

import pytest

from contracts.preferences import SimulatedVotes, VoterGroup
from examples.judges import brevity, vader
from feedback.simulate import Pair, Vote, simulate_votes

PANEL = SimulatedVotes(gold="examples.judges:vader")


def make_pairs(count: int) -> list[Pair]:
    return [Pair(f"pair-{i}", f"prompt-{i}", f"question {i}", f"answer a{i}", f"answer b{i}") for i in range(count)]


def votes_of(count: int, *, seed: int = 0, config: SimulatedVotes = PANEL) -> list[Vote]:
    """`a` is the better side of every even pair."""
    gold_a = [float(i % 2 == 0) for i in range(count)]
    return simulate_votes(make_pairs(count), gold_a, [1 - score for score in gold_a], config, seed=seed)


def is_right(vote: Vote) -> bool:
    return (vote.choice == "a") == (int(vote.pair_id.removeprefix("pair-")) % 2 == 0)


def test_every_pair_gets_distinct_voters_and_every_voter_the_same_load():
    votes = votes_of(333)
    for _, of_pair in groupby(votes, key=lambda vote: vote.pair_id):
        assert len({vote.voter for vote in of_pair}) == 5
    loads = Counter(vote.voter for vote in votes)
    assert sum(loads.values()) == 333 * 5
    assert len(loads) == 10
    assert max(loads.values()) - min(loads.values()) <= 1


def test_names_cannot_be_taken_for_people():
    names = {vote.voter for vote in votes_of(20)}
    assert "simulated-careful-03" in names
    assert all(name.startswith("simulated-") for name in names)


def test_groups_are_as_accurate_as_configured():
    votes = votes_of(4000)
    for group, accuracy in (("careful", 0.9), ("careless", 0.6), ("hostile", 0.15)):
        right = [is_right(vote) for vote in votes if f"-{group}-" in vote.voter]
        # 4,000 votes or more a group: four standard errors are at most 3 points
        assert sum(right) / len(right) == pytest.approx(accuracy, abs=0.03)


def test_perfect_and_perfectly_hostile_voters():
    voters = {"sage": VoterGroup(count=1, accuracy=1.0), "liar": VoterGroup(count=1, accuracy=0.0)}
    votes = votes_of(50, config=PANEL.model_copy(update={"voters": voters, "votes_per_pair": 2}))
    assert all(is_right(vote) == ("sage" in vote.voter) for vote in votes)


def test_equal_gold_scores_are_ties():
    votes = simulate_votes(make_pairs(4), [0.5] * 4, [0.5] * 4, PANEL, seed=1)
    assert {vote.choice for vote in votes} == {"tie"}


def test_sides_are_shown_left_equally_often_whatever_is_chosen():
    votes = votes_of(2000)
    shown = Counter((vote.left, vote.choice) for vote in votes)
    assert all(count / len(votes) == pytest.approx(0.25, abs=0.03) for count in shown.values())


def test_same_seed_same_votes():
    assert votes_of(40, seed=3) == votes_of(40, seed=3)
    assert votes_of(40, seed=3) != votes_of(40, seed=4)


def test_bad_input_is_named():
    pairs = make_pairs(2)
    with pytest.raises(ValueError, match="gold_b has 1 scores for 2 pairs"):
        simulate_votes(pairs, [0.0, 1.0], [0.0], PANEL, seed=0)
    with pytest.raises(ValueError, match="gold_a of pair 'pair-1' is nan"):
        simulate_votes(pairs, [0.0, float("nan")], [0.0, 0.0], PANEL, seed=0)
    with pytest.raises(ValueError, match="'pair-0' is used twice"):
        simulate_votes([pairs[0], pairs[0]], [0.0, 1.0], [0.0, 0.0], PANEL, seed=0)


def test_example_judges():
    good, bad, none = vader(
        ["", "", ""], ["What a wonderful idea, great!", "That is awful and sad.", ""], domain=[""] * 3
    )
    assert good > 0.5 > -0.5 > bad
    assert none == 0.0
    assert brevity(["", "", ""], ["word " * 40, "word " * 80, ""]) == [1.0, 0.5, 0.0]
