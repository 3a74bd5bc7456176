"""Asking: each way picks what it says, the same for the same input."""

import math

import numpy as np
import pytest

from feedback.sampling import (
    PRIOR_PRECISION,
    ask_at_random,
    ask_to_predict,
    ask_uncertain,
    ask_uncertain_and_diverse,
    disagreement,
    laplace_covariance,
    plan_to_predict,
    prompts_that_vary,
    shingles,
    variety,
    without_near_duplicates,
)
from feedback.text_features import text_differences


def test_random_is_seeded_and_even():
    assert ask_at_random(9, 4, seed=1).tolist() == ask_at_random(9, 4, seed=1).tolist()
    assert sorted(ask_at_random(9, 99, seed=2).tolist()) == list(range(9))
    asked = np.bincount(np.concatenate([ask_at_random(9, 3, seed=s) for s in range(900)]), minlength=9)
    assert asked == pytest.approx(np.full(9, 300), abs=60)


def test_disagreement_is_ignorance_not_noise():
    #                 agree, even,  disagree, split for certain
    members = np.array([[0.9, 0.5, 0.3, 0.0], [0.9, 0.5, 0.7, 1.0]])
    found = disagreement(members)
    assert found[:2] == pytest.approx([0, 0], abs=1e-12)
    direct = math.log(2) + 0.3 * math.log(0.3) + 0.7 * math.log(0.7)
    assert found[2:] == pytest.approx([direct, math.log(2)], abs=1e-9)
    assert ask_uncertain(found, 3).tolist() == [3, 2, 0]


def test_the_covariance_is_the_inverse_of_the_curvature():
    rng = np.random.default_rng(1)
    x, theta, ridge = rng.normal(size=(7, 3)), np.array([0.4, -1.0, 0.2]), 2.0

    def loss(at: np.ndarray) -> float:  # with labels of any kind: they are in its slope alone
        return float(np.logaddexp(0, -(x @ at)).sum() + ridge / 2 * at @ at)

    step, units = 1e-3, np.eye(3) * 1e-3
    curvature = [
        [
            (loss(theta + i + j) - loss(theta + i - j) - loss(theta - i + j) + loss(theta - i - j)) / (4 * step**2)
            for j in units
        ]
        for i in units
    ]
    found = laplace_covariance(x, 1 / (1 + np.exp(-(x @ theta))), ridge=ridge)
    assert np.linalg.inv(found) == pytest.approx(np.array(curvature), rel=1e-4, abs=1e-4)


def test_what_is_asked_to_predict_takes_most_variance_off_the_predictions():
    """Against the sum itself: for each pair the covariance with its label in, inverted anew."""
    rng = np.random.default_rng(2)
    x, p = rng.normal(size=(12, 4)) * [3, 1, 1, 0.2], rng.uniform(0.05, 0.95, 12)
    matters = rng.normal(size=(30, 4)) * [0.1, 1, 2, 1]
    target = matters.T @ matters / len(matters)
    precision = np.diag([0.5, 1.0, 2.0, 4.0])
    expected: list[int] = []
    for _ in range(5):
        left = {
            pair: np.mean([m @ np.linalg.inv(precision + p[pair] * (1 - p[pair]) * np.outer(x[pair], x[pair])) @ m
                           for m in matters])
            for pair in range(12) if pair not in expected
        }  # fmt: skip
        expected.append(min(left, key=lambda pair: left[pair]))
        precision += p[expected[-1]] * (1 - p[expected[-1]]) * np.outer(x[expected[-1]], x[expected[-1]])
    covariance = np.diag(1 / np.array([0.5, 1.0, 2.0, 4.0]))
    assert ask_to_predict(x, p, covariance, 5, target_DD=target).tolist() == expected
    assert sorted(ask_to_predict(x, p, covariance, 99).tolist()) == list(range(12))
    # a question whose answer is known says nothing, and the sides of a pair mean nothing
    assert (
        ask_to_predict(x, np.where(np.arange(12) == expected[0], 1.0, p), covariance, 1, target_DD=target)[0]
        != (expected[0])
    )
    assert ask_to_predict(-x, 1 - p, covariance, 5, target_DD=target).tolist() == expected


def test_a_plan_before_any_label_is_that_of_batches_one_after_the_other():
    """Each batch under the covariance that the pairs before it leave, inverted anew."""
    rng = np.random.default_rng(3)
    words = [f"w{number}" for number in range(40)]
    first, second = ([" ".join(rng.choice(words, 6)) for _ in range(30)] for _ in range(2))
    x, half = text_differences(first, second), np.full(30, 0.5)
    target = x.T @ x / len(x)
    known: list[int] = []
    while len(known) < len(x):
        rest = np.setdiff1d(np.arange(len(x)), known)
        covariance = laplace_covariance(x[known], half[known], ridge=PRIOR_PRECISION)
        known += rest[ask_to_predict(x[rest], half[rest], covariance, 7, target_DD=target)].tolist()
    assert plan_to_predict(first, second).tolist() == known


@pytest.mark.parametrize("number", [1, 3])
def test_few_pairs_and_pairs_without_a_difference_are_planned_too(number: int):
    assert sorted(plan_to_predict(["the same"] * number, ["the same"] * number).tolist()) == list(range(number))


def test_equal_uncertainty_goes_in_order():
    assert ask_uncertain(np.array([1.0, 2.0, 2.0, 1.0]), 3).tolist() == [1, 2, 0]
    assert ask_uncertain(np.array([1.0]), 5).tolist() == [0]


def test_diverse_takes_one_of_each_direction():
    east, north = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    features = np.array([east, [2.0, 0.1, 0.0], [-3.0, 0.0, 0.0], north, [0.0, 0.0, 1.0]])
    uncertainty = np.array([0.9, 0.8, 0.7, 0.6, 0.1])
    # the first three ask the same (one with its sides swapped); the last is not among the 2 * 2 most uncertain
    assert ask_uncertain_and_diverse(uncertainty, features, 2, pool=2).tolist() == [0, 3]
    assert sorted(ask_uncertain_and_diverse(uncertainty, features, 9).tolist()) == list(range(5))


def test_diverse_is_farthest_first():
    rng = np.random.default_rng(0)
    features, uncertainty = rng.normal(size=(40, 5)), rng.random(40)
    chosen = ask_uncertain_and_diverse(uncertainty, features, 6, pool=4).tolist()
    allowed = set(np.argsort(-uncertainty)[:24].tolist())
    directions = features / np.sqrt((features**2).sum(axis=1, keepdims=True))
    similar = np.abs(directions @ directions.T)
    assert chosen[0] == int(np.argmax(uncertainty))
    for place in range(1, 6):
        worst = {i: max(similar[i, j] for j in chosen[:place]) for i in allowed - set(chosen[:place])}
        assert chosen[place] == min(worst, key=worst.__getitem__)


def test_prompts_where_scores_spread_come_first():
    nan = float("nan")
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 4.0, nan], [0.0, 1.0, 2.0], [7.0, nan, nan], [nan, nan, nan]])
    assert prompts_that_vary(scores, 2).tolist() == [1, 2]
    assert prompts_that_vary(scores, 9).tolist() == [1, 2, 0, 3, 4]


def test_variety_of_texts():
    # 2 runs shared of 3 in all; equal but for case; nothing shared
    assert variety(["a b c", "Yes no", "x y", ""], ["a b c d", "yes NO", "u v", "a"]) == pytest.approx([1 / 3, 0, 1, 1])


def test_shingles_are_runs_of_words():
    assert len(shingles("one two three four", 3)) == 2
    assert shingles("One  two\nthree", 3) == shingles("one two three", 3)
    assert len(shingles("", 3)) == len(shingles("word", 3)) == 1


def make_texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(0, 500, 60)) for _ in range(count)]


def test_near_duplicates_are_bounded():
    texts = make_texts(30, 0)
    copies = [f"{text} indeed" for text in texts[:10]] + [text.upper() for text in texts[:10]]
    assert without_near_duplicates(texts + copies) == list(range(30))
    assert without_near_duplicates(texts + copies, at_most=2) == list(range(40))
    assert without_near_duplicates(texts + copies, at_most=3) == list(range(50))
    # one more word is a similarity of 58/59: another text when only equal ones count
    assert without_near_duplicates(texts + copies, similarity=1.0) == list(range(40))


def test_what_resembles_less_is_kept():
    (text,) = make_texts(1, 1)
    words = text.split()
    half = " ".join(words[:30] + [f"other{i}" for i in range(30)])
    assert without_near_duplicates([text, half]) == [0, 1]
    # 28 of 88 runs are shared
    assert without_near_duplicates([text, half], similarity=0.3) == [0]


def test_the_result_does_not_depend_on_hash_seeds():
    texts = make_texts(5, 2) + make_texts(5, 2)
    assert without_near_duplicates(texts, seed=1) == without_near_duplicates(texts, seed=2) == list(range(5))
    assert shingles("a b c", 3) == {3358461392}  # CRC-32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ask_at_random(3, 0, seed=0), "count is 0, allowed is 1 or more"),
        (lambda: ask_uncertain(np.ones(3), -1), "count is -1"),
        (lambda: ask_uncertain_and_diverse(np.ones(3), np.ones((3, 2)), 1, pool=0), "pool is 0"),
        (lambda: disagreement(np.ones((1, 4))), "at least 2 members"),
        (lambda: disagreement(np.array([[0.5, 1.5], [0.5, 0.5]])), "allowed is 0 to 1"),
        (lambda: disagreement(np.array([[0.5, np.nan], [0.5, 0.5]])), "no NaN"),
        (lambda: without_near_duplicates([], similarity=0), "similarity is 0"),
        (lambda: without_near_duplicates([], at_most=0), "at_most is 0"),
    ],
)
def test_bad_arguments_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
