"""Bradley-Terry with skills and position bias: finds what a panel was drawn from, and solves its own equations."""

import math

import numpy as np
import pytest

from feedback.ballots import Ballots
from feedback.crowd_bt import crowd_bradley_terry
from feedback.simulate import Vote

ITEMS, PAIRS = 20, 150


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def crowd(seed: int, *, bias: float, tie_share: float = 0.0, hostile: int = 4) -> tuple[np.ndarray, dict, Ballots]:
    """24 voters, 20 votes a pair: skills 0.95, of the first `hostile` 0.1; strengths, items of pairs, votes."""
    rng = np.random.default_rng(seed)
    strength = rng.normal(size=ITEMS)
    items = [rng.choice(ITEMS, 2, replace=False) for _ in range(PAIRS)]
    pairs = np.repeat(np.arange(PAIRS), 20)
    voters = np.concatenate([rng.choice(24, 20, replace=False) for _ in range(PAIRS)])
    left = rng.choice((1, -1), len(pairs))
    margin = np.array([strength[a] - strength[b] for a, b in items])[pairs]
    follows = rng.random(len(pairs)) < np.where(voters < hostile, 0.1, 0.95)
    picks_a = rng.random(len(pairs)) < sigmoid(np.where(follows, margin, -margin) + bias * left)
    choices = np.where(rng.random(len(pairs)) < tie_share, "tie", np.where(picks_a, "a", "b"))
    ballots = Ballots.from_columns(
        [f"{pair:03d}" for pair in pairs],
        [f"voter-{voter:02d}" for voter in voters],
        choices.tolist(),
        left=np.where(left > 0, "a", "b").tolist(),
    )
    return strength, {f"{p:03d}": (f"item-{a:02d}", f"item-{b:02d}") for p, (a, b) in enumerate(items)}, ballots


@pytest.mark.parametrize("bias", [0.0, 0.6, -0.6])
def test_strengths_skills_and_bias_are_found(bias: float):
    strength, items, ballots = crowd(3, bias=bias)
    found = crowd_bradley_terry(ballots, items)
    assert np.corrcoef(strength, [found.strength[f"item-{i:02d}"] for i in range(ITEMS)])[0, 1] > 0.97
    assert all((skill < 0.5) == (voter < "voter-04") for voter, skill in found.skill.items())
    assert 0.02 < found.position_bias_error < 0.1
    assert abs(found.position_bias - bias) < 3 * found.position_bias_error
    assert found.iterations < 200


def test_error_of_the_bias_is_that_of_repetition():
    found = [crowd_bradley_terry(ballots, items) for _, items, ballots in (crowd(s, bias=0.3) for s in range(12))]
    spread = np.std([result.position_bias for result in found], ddof=1)
    assert np.mean([result.position_bias_error for result in found]) == pytest.approx(spread, rel=0.5)


def test_mode_is_stationary():
    """No small change of a strength or the bias makes votes and priors likelier, with the formula of the paper."""
    _, items, ballots = crowd(5, bias=0.4, tie_share=0.2)
    found = crowd_bradley_terry(ballots, items, tolerance=1e-10, max_iterations=3000)
    names = list(found.strength)
    skill = np.array([found.skill[voter] for voter in ballots.voters])[ballots.voters_N]
    sides = np.array([[names.index(item) for item in items[pair]] for pair in ballots.pair_ids])[ballots.pairs_N]

    def log_posterior(strength: np.ndarray, bias: float) -> float:
        margin = strength[sides[:, 0]] - strength[sides[:, 1]]
        p_a = skill * sigmoid(margin + bias * ballots.left_N) + (1 - skill) * sigmoid(-margin + bias * ballots.left_N)
        share_a = (1 + ballots.signs_N) / 2
        votes = share_a * np.log(p_a) + (1 - share_a) * np.log(1 - p_a)
        return votes.sum() - (strength**2).sum() / (2 * 1.5**2) - bias**2 / 2

    best = np.array([found.strength[name] for name in names])
    bias = found.position_bias
    for change in 1e-4 * np.eye(ITEMS):
        slope = (log_posterior(best + change, bias) - log_posterior(best - change, bias)) / 2e-4
        assert slope == pytest.approx(0, abs=1e-3)
    assert (log_posterior(best, bias + 1e-4) - log_posterior(best, bias - 1e-4)) / 2e-4 == pytest.approx(0, abs=1e-3)


def test_without_items_each_pair_is_by_itself():
    votes = [Vote("x", f"voter-{n}", "a", "a") for n in range(6)] + [Vote("y", "voter-0", "tie", "b")]
    found = crowd_bradley_terry(votes)
    assert found.probability_a["x"] > 0.7
    assert found.probability_a["y"] == pytest.approx(0.5, abs=0.1)
    assert set(found.strength) == {"x/a", "x/b", "y/a", "y/b"}


def test_unknown_sides_have_no_bias():
    found = crowd_bradley_terry([Vote("x", "ann", "a", None)])
    assert (found.position_bias, found.position_bias_error) == (0.0, 0.0)


def test_swapping_the_sides_mirrors_the_result():
    _, items, ballots = crowd(6, bias=0.5)
    swapped = Ballots(
        ballots.pair_ids,
        ballots.voters,
        ballots.pairs_N,
        ballots.voters_N,
        np.array([1, 0, 2, 3])[ballots.choices_N],
        -ballots.left_N,
        ballots.active_s_N,
    )
    there = crowd_bradley_terry(ballots, items)
    back = crowd_bradley_terry(swapped, {pair: (b, a) for pair, (a, b) in items.items()})
    assert back.strength == pytest.approx(there.strength, abs=1e-9)
    assert back.position_bias == pytest.approx(there.position_bias, abs=1e-9)
    assert back.probability_a == pytest.approx({pair: 1 - p for pair, p in there.probability_a.items()}, abs=1e-9)


def test_nothing_and_unknown_pairs():
    assert crowd_bradley_terry([]).probability_a == {}
    with pytest.raises(ValueError, match="items has no pair 'x', nor 0 others"):
        crowd_bradley_terry([Vote("x", "ann", "a", "a")], {"y": ("i", "j")})
    assert math.isfinite(crowd_bradley_terry([Vote("x", "ann", "both_bad", "a")]).position_bias)
