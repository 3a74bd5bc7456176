"""Aggregation of votes: what it gains with bad voters, what it costs without, and that it is Dawid-Skene."""

import gzip
import json
import math
import random
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from contracts.preferences import SimulatedVotes, VoterGroup
from feedback.ballots import Ballots
from feedback.quality import (
    Aggregate,
    UnpairedLabel,
    comparisons,
    dawid_skene,
    majority,
    predicted_choices,
    unpaired_labels,
)
from feedback.simulate import Choice, Pair, Vote, simulate_votes

CROWD = Path(__file__).parents[3] / "shared" / "data" / "crowd_votes.jsonl.gz"
SEEDS = range(10)
HOSTILE = {"random": 0.2, "hostile": 0.2}
RANDOM = {"random": 0.4}
MIRROR: dict[Choice, Choice] = {"a": "b", "b": "a", "tie": "tie", "both_bad": "both_bad", "skip": "skip"}
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


PANELS = {"20% random 20% hostile": HOSTILE, "40% random": RANDOM, "good": {}}


@cache
def aggregated(panel: str, annotators: int) -> list[tuple[dict[str, bool], Aggregate, Aggregate]]:
    """Truth, majority and Dawid-Skene of ten seeds."""
    drawn = [panel_votes(PANELS[panel], seed=seed, annotators=annotators) for seed in SEEDS]
    return [(truth, majority(votes), dawid_skene(votes)) for truth, votes in drawn]


def gain_over_majority(panel: str, annotators: int) -> float:
    """Points of accuracy over the majority, averaged over ten seeds."""
    results = aggregated(panel, annotators)
    return 100 * fmean(share_right(learned, truth) - share_right(counted, truth) for truth, counted, learned in results)


@pytest.mark.parametrize(("panel", "points"), zip(PANELS, (12.0, 4.0, -1.0), strict=True))
def test_100_votes_an_annotator_beat_the_majority(panel: str, points: float):
    assert gain_over_majority(panel, annotators=50) >= points


@pytest.mark.parametrize(
    ("panel", "votes_each", "points"),
    [
        ("20% random 20% hostile", 25, 12.0),
        ("20% random 20% hostile", 10, 8.0),
        ("40% random", 25, 3.0),
        ("40% random", 10, 0.0),
        ("good", 25, -1.0),
        ("good", 10, -1.0),
    ],
)
def test_few_votes_an_annotator_do_not_fall_below_the_majority(panel: str, votes_each: int, points: float):
    assert gain_over_majority(panel, annotators=5000 // votes_each) >= points


@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize("votes_each", [2, 1])
def test_hardly_any_votes_an_annotator_are_the_majority(panel: str, votes_each: int):
    truth, votes = panel_votes(PANELS[panel], seed=0, annotators=1000 // votes_each, pairs=200)
    counted, learned = (share_right(method(votes), truth) for method in (majority, dawid_skene))
    assert learned >= counted - 0.01


def test_one_vote_an_annotator_is_the_majority():
    votes = [Vote(f"{pair}", f"voter-{pair}-{n}", "a" if n < pair else "b", "a") for pair in range(6) for n in range(5)]
    learned, counted = dawid_skene(votes).probability_a, majority(votes).probability_a
    assert all((learned[pair] > 0.5) == (counted[pair] > 0.5) for pair in counted)


def test_reliabilities_are_those_of_the_groups():
    _, votes = panel_votes(HOSTILE, seed=0, annotators=50)
    reliability = dawid_skene(votes).reliability
    for group, accuracy in ACCURACY.items():
        members = [value for voter, value in reliability.items() if f"-{group}-" in voter]
        # a voter's own vote helps to decide the pair, and what is learned of the panel pulls the groups together
        assert fmean(members) == pytest.approx(accuracy, abs=0.06)
        if group == "hostile":
            assert max(members) < 0.5


def test_a_hostile_vote_counts_inverted():
    votes = [Vote(f"{i}", voter, "a", "a") for i in range(60) for voter in ("ann", "bob")]
    votes += [Vote(f"{i}", "mallory", "b", "a") for i in range(60)]
    votes += [Vote("open", "mallory", "b", "a")]
    aggregate = dawid_skene(votes)
    assert aggregate.reliability["mallory"] < 0.3
    assert aggregate.probability_a["open"] > 0.7


GRID = [0.025 * step for step in range(1, 40)]


def direct_dawid_skene(votes: list[Vote], agree: float, disagree: float, rounds: int) -> tuple[dict, dict, dict]:
    """The same model written down as products over votes, no logs and no arrays: soft targets, reliabilities and the
    probabilities of being equal. A pair's state is a, equal or b better; a voter has one of 39 reliabilities."""
    pairs, voters = {vote.pair_id for vote in votes}, {vote.voter for vote in votes}
    states = {}
    for pair in pairs:
        said = [vote.choice for vote in votes if vote.pair_id == pair]
        states[pair] = [(said.count(choice) + 1) / (len(said) + 3) for choice in ("a", "tie", "b")]
    base = [r ** (agree - 1) * (1 - r) ** (disagree - 1) for r in GRID]
    base = [weight / sum(base) for weight in base]
    panel = base
    for _ in range(rounds):
        reliability, posteriors, rates = {}, [], {}
        weights = [(states[v.pair_id][0] + states[v.pair_id][2], states[v.pair_id][1]) for v in votes]
        habits = [
            (sum(w[s] for v, w in zip(votes, weights, strict=True) if v.choice == "tie") + 1)
            / (sum(w[s] for w in weights) + 2)
            for s in (0, 1)
        ]
        for voter in voters:
            mine = [(v, w) for v, w in zip(votes, weights, strict=True) if v.voter == voter]
            right = sum(states[v.pair_id][0 if v.choice == "a" else 2] for v, _ in mine if v.choice != "tie")
            wrong = sum(states[v.pair_id][2 if v.choice == "a" else 0] for v, _ in mine if v.choice != "tie")
            posterior = [p * r**right * (1 - r) ** wrong for r, p in zip(GRID, panel, strict=True)]
            posteriors.append([weight / sum(posterior) for weight in posterior])
            reliability[voter] = sum(r * weight for r, weight in zip(GRID, posteriors[-1], strict=True))
            rates[voter] = [
                (sum(w[s] for v, w in mine if v.choice == "tie") + 10 * habits[s]) / (sum(w[s] for _, w in mine) + 10)
                for s in (0, 1)
            ]
        learned = [fmean(column) for column in zip(*posteriors, strict=True)]
        # the panel's reliabilities are 1 part of the prior, the given one 0.3 parts
        panel = [(one + 0.3 * other) / 1.3 for one, other in zip(learned, base, strict=True)]
        equal = (sum(state[1] for state in states.values()) + 1) / (len(states) + 2)
        for pair in pairs:
            odds = [(1 - equal) / 2, equal, (1 - equal) / 2]
            for vote in votes:
                if vote.pair_id != pair:
                    continue
                r, (tie_better, tie_equal) = reliability[vote.voter], rates[vote.voter]
                likelihoods = {
                    "a": [(1 - tie_better) * r, (1 - tie_equal) / 2, (1 - tie_better) * (1 - r)],
                    "tie": [tie_better, tie_equal, tie_better],
                    "b": [(1 - tie_better) * (1 - r), (1 - tie_equal) / 2, (1 - tie_better) * r],
                }[vote.choice]
                odds = [o * likelihood for o, likelihood in zip(odds, likelihoods, strict=True)]
            states[pair] = [o / sum(odds) for o in odds]
    soft = {pair: state[0] + state[1] / 2 for pair, state in states.items()}
    return soft, reliability, {pair: state[1] for pair, state in states.items()}


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
    probability, reliability, equal = direct_dawid_skene(votes, 3, 2, rounds)
    assert fast.iterations == rounds
    assert fast.probability_a == pytest.approx(probability, rel=1e-9)
    assert fast.reliability == pytest.approx(reliability, rel=1e-9)
    assert fast.probability_equal == pytest.approx(equal, rel=1e-9)


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
    assert dropped == {"identical": 1, "empty": 1, "no votes": 1}
    assert [(c.chosen, c.prompt_id, c.domain, c.votes_chosen, c.votes_rejected) for c in kept] == [
        ("yes", "prompt-for-a", "facts", 1, 0),
        ("no", "prompt-for-b", "facts", 2, 0),
        ("yes", "prompt-even", "facts", 1, 1),
    ]
    assert [c.probability for c in kept] == pytest.approx([2 / 3, 3.5 / 5, 0.5])


def test_opposite_votes_of_equal_voters_stay_exactly_even():
    pairs = [Pair(f"{i}", "p", "q", "yes", "no") for i in range(9)]
    votes = [Vote(p.pair_id, f"voter-{n}", "a" if n % 2 else "b", "a") for p in pairs for n in range(6)]
    kept, dropped = comparisons(pairs, dawid_skene(votes))
    assert dropped == {}
    assert {(c.chosen, c.probability, c.votes_chosen, c.votes_rejected) for c in kept} == {("yes", 0.5, 3, 3)}


def test_ties_are_soft_targets_never_broken():
    def votes(pair: str, *choices: Choice) -> list[Vote]:
        return [Vote(pair, f"voter-{n}", choice, "a") for n, choice in enumerate(choices)]

    # enough clear pairs to learn that these five voters are good
    sides: tuple[Choice, ...] = ("a", "b")
    panel = [vote for i in range(40) for vote in votes(f"clear-{i}", *(sides[i % 2],) * 5)]
    panel += [vote for i in range(10) for vote in votes(f"equal-{i}", "tie", "tie", "tie", "tie", "tie")]
    panel += votes("one", "a", "tie", "tie", "tie", "tie") + votes("most", "a", "a", "a", "a", "tie")
    panel += votes("bad", "both_bad", "both_bad", "both_bad", "both_bad", "both_bad")
    found = dawid_skene(panel)
    assert found.probability_a["equal-3"] == found.probability_a["bad"] == 0.5
    assert 0.5 < found.probability_a["one"] < 0.6 < 0.95 < found.probability_a["most"]
    assert found.probability_equal["one"] > 0.9 > 0.1 > found.probability_equal["most"]
    assert (found.both_bad, majority(panel).both_bad) == ({"bad": 5}, {"bad": 5})
    # who says tie where responses are equal is no worse a voter
    assert min(found.reliability.values()) > 0.9
    for voter in found.tie_rates.values():
        assert voter[0] < 0.2 < 0.7 < voter[1]


def test_both_bad_by_most_votes_makes_unpaired_labels():
    pairs = [Pair(i, f"prompt-{i}", "Why?", "because", " ") for i in ("bad", "split")] + [
        Pair("worse", "prompt-worse", "Why?", "no", "idea")
    ]
    choices: dict[str, tuple[Choice, ...]] = {
        "bad": ("both_bad",),
        "split": ("both_bad", "a"),
        "worse": ("both_bad", "a", "both_bad", "skip"),
    }
    votes = [Vote(pair, f"voter-{n}", c, "a") for pair, cs in choices.items() for n, c in enumerate(cs)]
    assert unpaired_labels(pairs, votes) == [
        UnpairedLabel("Why?", "because", False, "prompt-bad", 1, 1),
        UnpairedLabel("Why?", "no", False, "prompt-worse", 2, 3),
        UnpairedLabel("Why?", "idea", False, "prompt-worse", 2, 3),
    ]
    assert unpaired_labels(pairs, []) == []


def test_gold_checks_find_a_hostile_majority():
    """Three of four voters always lie: alone the votes mislead, twenty gold checks say who is who."""
    truth, votes = {}, []
    for i in range(200):
        truth[f"{i:03d}"] = better = "a" if i % 3 else "b"
        votes += [Vote(f"{i:03d}", f"liar-{n}", MIRROR[better], "a") for n in range(3)]  # type: ignore[index]
        votes.append(Vote(f"{i:03d}", "honest", better, "a"))  # type: ignore[arg-type]
    gold = {pair: truth[pair] for pair in list(truth)[:20]}
    blind, checked = dawid_skene(votes), dawid_skene(votes, gold=gold)  # type: ignore[arg-type]
    assert share_right(blind, {pair: side == "a" for pair, side in truth.items()}) == 0.0
    assert share_right(checked, {pair: side == "a" for pair, side in truth.items()}) == 1.0
    assert all((value > 0.5) == (voter == "honest") for voter, value in checked.reliability.items())
    assert [checked.probability_a[pair] for pair in gold] == [float(side == "a") for side in gold.values()]
    with pytest.raises(ValueError, match="gold answer of pair 'x' is 'left', allowed is a, tie, both_bad, b"):
        dawid_skene(votes, gold={"x": "left"})  # type: ignore[dict-item]


@pytest.mark.parametrize(("votes_each", "error"), [(100, 0.03), (25, 0.05), (10, 0.09)])
@pytest.mark.parametrize("panel", PANELS)
def test_probabilities_are_calibrated(panel: str, votes_each: int, error: float):
    """Of pairs called 0.8, about 0.8 are so: expected calibration error over ten bins, 10,000 pairs."""
    stated, right = [], []
    for truth, _, aggregate in aggregated(panel, 5000 // votes_each):
        for pair, p in aggregate.probability_a.items():
            stated.append(max(p, 1 - p))
            right.append(0.5 if p == 0.5 else float((p > 0.5) == truth[pair]))
    stated_N, right_N = np.array(stated), np.array(right)
    bins_N = np.minimum(((stated_N - 0.5) * 20).astype(int), 9)
    gaps = [abs(stated_N[bins_N == b].mean() - right_N[bins_N == b].mean()) for b in np.unique(bins_N)]
    assert np.average(gaps, weights=np.unique(bins_N, return_counts=True)[1]) < error


def test_predictions_of_single_votes_add_up_and_are_the_model():
    aggregate = Aggregate(
        {"x": 0.8, "y": 0.5},
        {"ann": 0.9, "bob": 0.7},
        probability_equal={"x": 0.2, "y": 0.6},
        tie_rates={"ann": (0.1, 0.6), "bob": (0.3, 0.8)},
    )
    predicted = predicted_choices(aggregate, ["x", "y", "new"], ["ann", "bob", "stranger"])
    assert predicted.sum(axis=1) == pytest.approx(1)
    # x: a better 0.7, equal 0.2, b better 0.1
    assert predicted[0] == pytest.approx(
        [0.9 * (0.7 * 0.9 + 0.1 * 0.1) + 0.2 * 0.4 / 2, 0.8 * 0.1 + 0.2 * 0.6, 0.9 * (0.7 * 0.1 + 0.1 * 0.9) + 0.04]
    )
    assert predicted[1] == pytest.approx([0.2 * 0.7 + 0.06, 0.4 * 0.3 + 0.6 * 0.8, 0.2 * 0.7 + 0.06])
    assert predicted[2, 1] == pytest.approx(0.6 * 0.2 + 0.4 * 0.7)


@pytest.mark.skipif(not CROWD.exists(), reason="the crowd votes are not beside this checkout (shared/data)")
def test_held_out_crowd_votes_are_foretold_better_than_by_the_majority():
    with gzip.open(CROWD, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    names = {"left": "a", "right": "b", "tie": "tie"}
    ballots = Ballots.from_columns(
        [row["id"] for row in rows], [row["worker"] for row in rows], [names[row["winner"]] for row in rows]
    )
    held_out = np.random.default_rng(0).random(len(rows)) < 0.2
    known, asked = ballots.select(~held_out), ballots.select(held_out)
    pairs = [ballots.pair_ids[pair] for pair in asked.pairs_N]
    voters = [ballots.voters[voter] for voter in asked.voters_N]
    said = np.array([0, 2, 1])[asked.choices_N]
    predicted = predicted_choices(dawid_skene(known), pairs, voters)
    counts = np.stack([known.counts_P(0), known.counts_P(2), known.counts_P(1)], axis=1) + 1.0
    majority_says = (counts / counts.sum(axis=1, keepdims=True))[asked.pairs_N]
    losses = [-np.log(p[np.arange(len(said)), said]).mean() for p in (predicted, majority_says)]
    assert losses[0] < losses[1] - 0.08  # 0.80 against 0.93 when it was written
