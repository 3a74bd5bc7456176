"""Aggregation of votes: what it gains with bad voters, what it costs without, and that it is Dawid-Skene."""

import math
import random
from statistics import fmean

import pytest

from contracts.config import SimulatedVotes, VoterGroup
from feedback.quality import Aggregate, comparisons, dawid_skene, majority
from feedback.simulate import Choice, Pair, Vote, simulate_votes

SEEDS = range(10)
HOSTILE = {"random": 0.2, "hostile": 0.2}
RANDOM = {"random": 0.4}
MIRROR: dict[Choice, Choice] = {"a": "b", "b": "a", "tie": "tie"}
ACCURACY = {"good": 0.8, "random": 0.5, "hostile": 0.2}


def panel_votes(bad: dict[str, float], *, seed: int, annotators: int, pairs: int = 1000) -> tuple[dict, list[Vote]]:
    """Which pairs are better on side a, and 5 votes a pair by a panel with these shares of bad annotators."""
    counts = {group: round(annotators * share) for group, share in bad.items()}
    counts["good"] = annotators - sum(counts.values())
    voters = {group: VoterGroup(count=count, accuracy=ACCURACY[group]) for group, count in counts.items()}
    config = SimulatedVotes(gold="examples.judges:vader", votes_per_pair=5, voters=voters)
    coin = random.Random(seed)
    gold_a = [coin.choice((-1.0, 1.0)) for _ in range(pairs)]
    asked = [Pair(f"{i:04d}", f"p{i}", f"question {i}", f"a{i}", f"b{i}") for i in range(pairs)]
    votes = simulate_votes(asked, gold_a, [0.0] * pairs, config, seed=seed)
    return {pair.pair_id: score > 0 for pair, score in zip(asked, gold_a, strict=True)}, votes


def share_right(aggregate: Aggregate, a_is_better: dict[str, bool]) -> float:
    return fmean(
        0.5 if abs(p - 0.5) < 1e-9 else float((p > 0.5) == a_is_better[pair_id])
        for pair_id, p in aggregate.probability_a.items()
    )


def gain_over_majority(bad: dict[str, float], annotators: int) -> float:
    """Points of accuracy over the majority, averaged over ten seeds."""
    gains = []
    for seed in SEEDS:
        truth, votes = panel_votes(bad, seed=seed, annotators=annotators)
        gains.append(share_right(dawid_skene(votes), truth) - share_right(majority(votes), truth))
    return 100 * fmean(gains)


@pytest.mark.parametrize(
    ("bad", "points"),
    [(HOSTILE, 12.0), (RANDOM, 4.0), ({}, -1.0)],
    ids=["20% random 20% hostile", "40% random", "good"],
)
def test_100_votes_an_annotator_beat_the_majority(bad: dict[str, float], points: float):
    assert gain_over_majority(bad, annotators=50) >= points


@pytest.mark.parametrize("bad", [HOSTILE, RANDOM, {}], ids=["20% random 20% hostile", "40% random", "good"])
@pytest.mark.parametrize("votes_each", [10, 25])
def test_few_votes_an_annotator_fall_back_to_the_majority(bad: dict[str, float], votes_each: int):
    assert gain_over_majority(bad, annotators=5000 // votes_each) >= -1.0


def test_one_vote_an_annotator_is_the_majority():
    votes = [Vote(f"{pair}", f"voter-{pair}-{n}", "a" if n < pair else "b", "a") for pair in range(6) for n in range(5)]
    learned, counted = dawid_skene(votes).probability_a, majority(votes).probability_a
    assert all((learned[pair] > 0.5) == (counted[pair] > 0.5) for pair in counted)


def test_reliabilities_are_those_of_the_groups():
    _, votes = panel_votes(HOSTILE, seed=0, annotators=50)
    reliability = dawid_skene(votes).reliability
    for group, accuracy in ACCURACY.items():
        members = [value for voter, value in reliability.items() if f"-{group}-" in voter]
        # 100 votes each beside the prior's 18; the rest is that a voter's own vote helped to decide the pair
        assert fmean(members) == pytest.approx((100 * accuracy + 12) / 118, abs=0.06)
        if group == "hostile":
            assert max(members) < 0.5


def test_a_hostile_vote_counts_inverted():
    votes = [Vote(f"{i}", voter, "a", "a") for i in range(60) for voter in ("ann", "bob")]
    votes += [Vote(f"{i}", "mallory", "b", "a") for i in range(60)]
    votes += [Vote("open", "mallory", "b", "a")]
    aggregate = dawid_skene(votes)
    assert aggregate.reliability["mallory"] < 0.3
    assert aggregate.probability_a["open"] > 0.7


def direct_dawid_skene(votes: list[Vote], agree: float, disagree: float, rounds: int) -> tuple[dict, dict]:
    """The same model written down as products over votes, no logs and no arrays; a tie is half a vote each way."""
    pairs, voters = {vote.pair_id for vote in votes}, {vote.voter for vote in votes}
    share_a = {"a": 1.0, "tie": 0.5, "b": 0.0}
    probability = {}
    for pair in pairs:
        shares = [share_a[vote.choice] for vote in votes if vote.pair_id == pair]
        probability[pair] = (sum(shares) + 1) / (len(shares) + 2)
    for _ in range(rounds):
        reliability = {}
        for voter in voters:
            mine = [vote for vote in votes if vote.voter == voter]
            right = sum(
                probability[v.pair_id] * share_a[v.choice] + (1 - probability[v.pair_id]) * (1 - share_a[v.choice])
                for v in mine
            )
            reliability[voter] = (agree + right) / (agree + disagree + len(mine))
        for pair in pairs:
            if_a = if_b = 0.5
            for vote in votes:
                if vote.pair_id == pair:
                    r, share = reliability[vote.voter], share_a[vote.choice]
                    if_a *= r**share * (1 - r) ** (1 - share)
                    if_b *= r ** (1 - share) * (1 - r) ** share
            probability[pair] = if_a / (if_a + if_b)
    return probability, reliability


def random_votes(seed: int, *, pairs: int = 25, voters: int = 8) -> list[Vote]:
    coin = random.Random(seed)
    return [
        Vote(f"{pair}", f"voter-{voter}", coin.choice(("a", "a", "b", "tie")), coin.choice(("a", "b")))
        for pair in range(pairs)
        for voter in coin.sample(range(voters), 4)
    ]


@pytest.mark.parametrize("rounds", [1, 2, 40])
def test_em_is_the_direct_sum(rounds: int):
    votes = random_votes(1)
    fast = dawid_skene(votes, prior_agree=3, prior_disagree=2, max_iterations=rounds, tolerance=0)
    probability, reliability = direct_dawid_skene(votes, 3, 2, rounds)
    assert fast.iterations == rounds
    assert fast.probability_a == pytest.approx(probability, rel=1e-9)
    assert fast.reliability == pytest.approx(reliability, rel=1e-9)


def test_majority_is_smoothed_and_counts_a_tie_as_half():
    votes = [Vote("x", "ann", "a", "a"), Vote("x", "bob", "a", "a"), Vote("x", "cy", "tie", "a")]
    aggregate = majority(votes)
    assert aggregate.probability_a == {"x": pytest.approx(3.5 / 5)}
    assert aggregate.votes == {"x": (2, 0)}
    assert aggregate.reliability == {}


@pytest.mark.parametrize("method", [majority, dawid_skene])
def test_swapping_the_sides_mirrors_the_result(method):
    votes = random_votes(2)
    mirrored = [Vote(v.pair_id, v.voter, MIRROR[v.choice], v.left) for v in votes]
    there, back = method(votes), method(mirrored)
    assert there.probability_a == pytest.approx({pair: 1 - p for pair, p in back.probability_a.items()}, abs=1e-12)
    assert there.reliability == pytest.approx(back.reliability, abs=1e-12)


def test_order_of_votes_does_not_matter():
    votes = random_votes(3)
    assert dawid_skene(votes) == dawid_skene(votes)
    assert dawid_skene(votes[::-1]) == dawid_skene(votes)


def test_the_last_vote_of_a_voter_on_a_pair_stands():
    stuffed = [Vote("x", "mallory", "b", "a")] * 100 + [Vote("x", "mallory", "a", "a")]
    assert majority(stuffed).votes == {"x": (1, 0)}
    assert dawid_skene(stuffed) == dawid_skene(stuffed[-1:])


def test_a_thousand_votes_on_a_pair_stay_finite():
    votes = [Vote(f"{pair}", f"voter-{n}", "a", "a") for pair in range(3) for n in range(1000)]
    assert all(math.isfinite(p) and p > 0.99 for p in dawid_skene(votes).probability_a.values())


def test_no_votes_is_no_result():
    assert dawid_skene([]) == Aggregate({}, {}, {}, 1)


def test_prior_must_say_which_side_is_meant():
    with pytest.raises(ValueError, match="prior_agree > prior_disagree > 0"):
        dawid_skene([], prior_agree=2, prior_disagree=2)


def test_comparisons_keep_the_likelier_side_and_say_what_was_left_out():
    def pair(pair_id: str, a: str = "yes", b: str = "no") -> Pair:
        return Pair(pair_id, f"prompt-{pair_id}", "Is it?", a, b, domain="facts")

    pairs = [pair("for-a"), pair("for-b"), pair("same", "yes", " yes\n"), pair("blank", "yes", "  ")]
    pairs += [pair("even"), pair("unseen")]
    votes = [Vote(p.pair_id, "ann", "a", "a") for p in pairs[:4] if p.pair_id != "for-b"]
    votes += [Vote("for-b", "ann", "b", "a"), Vote("for-b", "bob", "b", "a"), Vote("for-b", "cy", "tie", "a")]
    votes += [Vote("even", "ann", "a", "a"), Vote("even", "bob", "b", "a")]
    kept, dropped = comparisons(pairs, majority(votes))
    assert dropped == {"identical": 1, "empty": 1, "undecided": 1, "no votes": 1}
    assert [(c.chosen, c.prompt_id, c.domain, c.votes_chosen, c.votes_rejected) for c in kept] == [
        ("yes", "prompt-for-a", "facts", 1, 0),
        ("no", "prompt-for-b", "facts", 2, 0),
    ]
    assert [c.probability for c in kept] == pytest.approx([2 / 3, 3.5 / 5])


def test_opposite_votes_of_equal_voters_are_undecided_after_em():
    pairs = [Pair(f"{i}", "p", "q", "yes", "no") for i in range(9)]
    votes = [Vote(p.pair_id, f"voter-{n}", "a" if n % 2 else "b", "a") for p in pairs for n in range(6)]
    assert comparisons(pairs, dawid_skene(votes)) == ([], {"undecided": 9})
