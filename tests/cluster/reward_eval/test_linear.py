"""Linear Bradley-Terry models against their own equations, and against data with a known answer."""

import numpy as np
import pytest

from cluster.reward_eval.linear import (
    cross_fitted,
    fit_bradley_terry,
    length_differences,
    prompt_folds,
    word_differences,
)
from cluster.reward_eval.numbers import accuracy, sigmoid


def drawn(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.array([1.5, -0.7, 0.0, 0.0])
    x = rng.normal(size=(count, 4)) * np.array([1.0, 2.0, 0.1, 5.0])
    return x, (rng.random(count) < sigmoid(x @ truth)).astype(float), truth


def test_a_fit_solves_its_equations_and_finds_the_truth():
    x, y, truth = drawn(4000, seed=0)
    weights = fit_bradley_terry(x, y, l2=2.0)
    scale = np.sqrt((x**2).mean(axis=0))
    gradient = (x / scale).T @ (sigmoid(x @ weights) - y) + 2.0 * weights * scale
    assert np.abs(gradient).max() < 0.02  # of sums over 4,000 pairs
    assert weights[:2] == pytest.approx(truth[:2], abs=0.15)
    assert np.abs(fit_bradley_terry(x, y, l2=1e6)).max() < 0.01


def test_swapping_the_sides_turns_the_sign_and_nothing_else():
    x, y, _ = drawn(300, seed=1)
    assert fit_bradley_terry(-x, 1 - y, l2=1.0) == pytest.approx(fit_bradley_terry(x, y, l2=1.0), abs=1e-4)


def test_folds_keep_prompts_whole_and_are_of_like_size():
    prompts = [f"prompt {number % 37}" for number in range(500)]
    folds = prompt_folds(prompts, 5, seed=0)
    by_prompt = {prompt: {int(f) for p, f in zip(prompts, folds, strict=True) if p == prompt} for prompt in prompts}
    assert all(len(found) == 1 for found in by_prompt.values())
    sizes = np.bincount([next(iter(found)) for found in by_prompt.values()])
    assert sizes.max() - sizes.min() <= 1


def test_a_prompt_is_never_judged_by_itself():
    """Labels that are noise of their prompt: whoever sees other pairs of the prompt is right, others are not."""
    rng = np.random.default_rng(2)
    prompts = [f"prompt {number // 10}" for number in range(600)]
    side = np.repeat(rng.choice((-1.0, 1.0), 60), 10)
    x = np.zeros((600, 60))
    x[np.arange(600), np.arange(600) // 10] = side  # a feature a prompt
    margins = cross_fitted(x, np.ones(600), prompts, l2s=(0.01,))
    assert np.abs(margins).max() == 0.0


def test_length_alone_learns_its_direction_from_others():
    rng = np.random.default_rng(3)
    lengths = rng.integers(10, 300, (400, 2))
    prompts = [f"prompt {number}" for number in range(400)]
    shorter_wins = (lengths[:, 0] < lengths[:, 1]).astype(float)
    flipped = np.where(rng.random(400) < 0.1, 1 - shorter_wins, shorter_wins)
    margins = cross_fitted(length_differences(lengths), flipped, prompts, l2s=(1e-3,))
    assert accuracy(margins, shorter_wins, prompts).value > 0.98


def test_a_bag_of_words_finds_the_word_and_no_more():
    rng = np.random.default_rng(4)
    words = np.array(["the", "a", "of", "river", "mill", "wheel", "gate", "water", "stone", "morning"])
    texts = [" ".join(rng.choice(words, 8)) for _ in range(600)]
    chosen = [f"{text} thanks" if rng.random() < 0.8 else text for text in texts[:300]]
    rejected = texts[300:]
    prompts = [f"prompt {number}" for number in range(300)]
    differences = word_differences(chosen, rejected)
    assert accuracy(cross_fitted(differences, np.ones(300), prompts), np.ones(300), prompts).value > 0.8
    noise = word_differences(texts[:300], texts[300:])
    flips = (rng.random(300) < 0.5).astype(float)
    assert accuracy(cross_fitted(noise, flips, prompts), flips, prompts).low < 0.5


def test_terms_that_one_text_alone_has_are_left_out():
    differences = word_differences(["good unique", "good"], ["bad", "bad"])
    assert differences.shape == (2, 2)  # good, bad; neither "unique" nor the pair of words
    assert differences[1] == pytest.approx(-differences[1][::-1])
