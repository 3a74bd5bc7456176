"""Agreement against published examples; flags that find who should be found and keep their level."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from feedback.annotators import binomial_tails, krippendorff_alpha, nominal_alpha, side_bias, too_fast
from feedback.ballots import Ballots
from feedback.simulate import Choice, Vote

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": the examples of sections A, B and C
PUBLISHED = {
    "two observers, two values": (["0100000010", "1110010000"], 0.095),
    "two observers": (["aabbdcccedda", "babbbccceddd"], 0.692),
    "four observers, missing data": (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
}


@pytest.mark.parametrize(("coders", "alpha"), PUBLISHED.values(), ids=PUBLISHED)
def test_alpha_is_the_published_one(coders: list[str], alpha: float):
    cells = [(unit, value) for coder in coders for unit, value in enumerate(coder) if value != "."]
    values = sorted({value for _, value in cells})
    units_N = np.array([unit for unit, _ in cells])
    values_N = np.array([values.index(value) for _, value in cells])
    assert nominal_alpha(units_N, values_N, num_values=len(values)) == pytest.approx(alpha, abs=5e-4)


def test_alpha_of_votes():
    def votes(*choices: Choice) -> list[Vote]:
        return [Vote(f"{i // 2}", f"voter-{i % 2}", choice, "a") for i, choice in enumerate(choices)]

    assert krippendorff_alpha(votes("a", "a", "b", "b", "tie", "tie")) == 1.0
    # o = 2, n = 4, each value twice: 1 - (4 - 1) * 4 / (16 - 8)
    assert krippendorff_alpha(votes("a", "b", "b", "a")) == -0.5
    single = [Vote("9", "voter-0", "both_bad", "a"), Vote("8", "voter-1", "skip", "a")]
    assert krippendorff_alpha([*votes("a", "b", "b", "a"), *single]) == -0.5
    assert math.isnan(krippendorff_alpha(single))
    assert math.isnan(krippendorff_alpha(votes("a", "a")))


def test_binomial_tails_are_the_sums():
    cases = [(0, 5, 0.5), (5, 5, 0.5), (7, 20, 0.1), (60, 100, 0.5), (0, 0, 0.3)]
    tails = binomial_tails(*(np.array(column, dtype=float) for column in zip(*cases, strict=True)))
    for tail, (k, n, p) in zip(tails, cases, strict=True):
        chance = Fraction(p)
        direct = sum(math.comb(n, x) * chance**x * (1 - chance) ** (n - x) for x in range(k, n + 1))
        assert tail == pytest.approx(float(direct), rel=1e-9)


def panel(seed: int, *, leftists: int = 0, hasty: int = 0, voters: int = 50, votes_each: int = 60) -> list[Vote]:
    """Votes of an even-handed panel, but for the first voters who pick left 4 times of 5, and the last who hurry."""
    coin = random.Random(seed)
    votes = []
    for voter in range(voters):
        for pair in coin.sample(range(300), votes_each):
            left = coin.choice(("a", "b"))
            picks_left = coin.random() < (0.8 if voter < leftists else 0.5)
            choice = left if picks_left else "ab".replace(left, "")
            seconds = (10 + pair % 40) * coin.lognormvariate(0, 0.3) * (0.2 if voter >= voters - hasty else 1)
            votes.append(Vote(f"{pair}", f"voter-{voter:02d}", choice, left, seconds))  # type: ignore[arg-type]
    return votes


def test_biased_and_hasty_voters_are_found_and_nobody_else():
    votes = panel(1, leftists=4, hasty=3, votes_each=90)
    biased, hasty = side_bias(votes), too_fast(votes)
    assert sorted(flag.voter for flag in biased) == [f"voter-{n:02d}" for n in range(4)]
    assert sorted(flag.voter for flag in hasty) == [f"voter-{n}" for n in (47, 48, 49)]
    assert {flag.reason for flag in biased} == {"left-biased"}
    assert [flag.p_value for flag in biased] == sorted(flag.p_value for flag in biased)
    for flag in biased:
        mine = [vote for vote in votes if vote.voter == flag.voter]
        assert flag.observed == pytest.approx(sum(vote.choice == vote.left for vote in mine) / 90)
        assert (flag.votes, flag.expected) == (90, 0.5)
    assert all(flag.observed > 0.9 and flag.expected < 0.1 for flag in hasty)


def test_who_picks_the_right_side_is_named_so():
    votes = [Vote(f"{i}", "ann", "b", "a") for i in range(30)]
    assert [(flag.reason, flag.observed) for flag in side_bias(votes)] == [("right-biased", 0.0)]


def test_level_holds_for_the_whole_panel():
    """Of 120 even-handed panels of 50, about 5 in 100 have a flag; without a correction 9 in 10 would."""
    flagged = [sum(bool(test(panel(seed, votes_each=20))) for seed in range(120)) for test in (side_bias, too_fast)]
    # 6 expected at most; 14 or more has a chance of 4 in 1000
    assert max(flagged) < 14
    loose = sum(bool(side_bias(panel(seed, votes_each=20), level=0.9)) for seed in range(30))
    assert loose > 6


def test_more_annotators_need_more_evidence():
    suspect = [Vote(f"{i}", "eve", "a" if i < 17 else "b", "a") for i in range(21)]  # p = 0.007
    others = [Vote(f"{i}", f"voter-{n}", "a" if i % 2 else "b", "a") for n in range(20) for i in range(20)]
    assert [flag.voter for flag in side_bias(suspect)] == ["eve"]
    assert side_bias(suspect + others) == []


def test_time_is_held_against_that_of_others_on_the_same_pair():
    # every pair of ann's is short; she takes as long over it as the others do
    votes = [Vote(f"short-{i}", voter, "a", "a", 2.0) for i in range(40) for voter in ("ann", "bob", "cy")]
    votes += [Vote(f"long-{i}", voter, "a", "a", 90.0) for i in range(40) for voter in ("bob", "cy", "dee")]
    assert too_fast(votes) == []
    votes += [Vote(f"long-{i}", "eve", "a", "a", 25.0) for i in range(40)]
    assert [(flag.voter, flag.observed) for flag in too_fast(votes)] == [("eve", 1.0)]


def test_unknown_times_and_sides_are_no_evidence():
    votes = [Vote(f"{i}", voter, "a", None) for i in range(40) for voter in ("ann", "bob")]
    assert side_bias(votes) == too_fast(votes) == []
    alone = [Vote(f"{i}", "ann", "a", "a", 0.1) for i in range(40)]
    assert too_fast(alone) == []
    assert side_bias([Vote(f"{i}", "ann", "tie", "a") for i in range(40)]) == []
    assert side_bias(Ballots.of([])) == too_fast(Ballots.of([])) == []


def test_fraction_is_checked():
    with pytest.raises(ValueError, match="fraction is 1, allowed is more than 0 and less than 1"):
        too_fast([], fraction=1)
