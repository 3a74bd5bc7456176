"""What the gate lets pass: literal limits, either way, and nothing that is no number."""

import itertools
import math
from pathlib import Path

import pytest

from contracts.serving import GateConfig
from serving.gate import Measured, Sampled, compare, decide, kl_k3

LIMITS = GateConfig(prompts=Path("p.jsonl"), max_reward_drop=0.25, max_kl=2.0, max_length_ratio=2.0)
CURRENT = Measured(reward=1.0, response_tokens=20.0)


@pytest.mark.parametrize(
    ("reward", "tokens", "kl", "refused_for"),
    [
        (1.0, 20.0, 0.0, []),
        (0.75, 40.0, 2.0, []),  # at the limits
        (0.75, 10.0, 2.0, []),
        (9.0, 20.0, -0.1, []),  # an estimate may be below 0
        (0.74, 20.0, 0.0, ["max_reward_drop"]),
        (1.0, 41.0, 0.0, ["max_length_ratio"]),
        (1.0, 9.0, 0.0, ["max_length_ratio"]),
        (1.0, 0.0, 0.0, ["max_length_ratio"]),
        (1.0, 20.0, 2.1, ["max_kl"]),
        (0.0, 90.0, 99.0, ["max_reward_drop", "max_kl", "max_length_ratio"]),
        (math.nan, 20.0, 0.0, ["max_reward_drop"]),
        (1.0, 20.0, math.nan, ["max_kl"]),
        (1.0, 20.0, math.inf, ["max_kl"]),
    ],
)
def test_limits(reward: float, tokens: float, kl: float, refused_for: list[str]) -> None:
    verdict = decide(CURRENT, Measured(reward, tokens), kl, LIMITS)
    assert verdict.promote == (not refused_for)
    limits = ("max_reward_drop", "max_kl", "max_length_ratio")
    assert [limit for limit in limits if limit in verdict.reason] == refused_for


def test_the_reason_says_what_was_compared() -> None:
    verdict = decide(CURRENT, Measured(0.5, 20.0), 0.0, LIMITS)
    assert verdict.reason == "reward 0.5, 1 before (max_reward_drop 0.25)"
    assert verdict.metrics == {
        "reward": 0.5,
        "reward_current": 1.0,
        "kl": 0.0,
        "response_tokens": 20.0,
        "response_tokens_current": 20.0,
    }


def test_the_estimate_of_the_kl_is_right_on_average_and_never_negative() -> None:
    """All responses of two tokens from three, each weighted with its probability: the sum is the KL itself."""
    sampled, other = [0.5, 0.3, 0.2], [[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]  # the second token's depend on its place
    exact = sum(p * math.log(p / q[token]) for q in other for token, p in enumerate(sampled))
    estimates = {
        (a, b): kl_k3([math.log(sampled[a]), math.log(sampled[b])], [math.log(other[0][a]), math.log(other[1][b])])
        for a, b in itertools.product(range(3), repeat=2)
    }
    assert sum(sampled[a] * sampled[b] * each for (a, b), each in estimates.items()) == pytest.approx(exact)
    assert min(estimates.values()) > 0
    assert kl_k3([-1.5, -0.25], [-1.5, -0.25]) == 0.0
    assert kl_k3([-1.0], [-math.inf]) == math.inf


def sampled(version: int, rewards: list[dict[str, float] | str], *lengths: int) -> Sampled:
    return Sampled(version, [[7] * each for each in lengths], [[-1.0] * each for each in lengths], rewards)


def test_versions_are_compared_on_the_prompts_that_the_current_one_is_scored_on() -> None:
    before = sampled(3, [{"a": 1.0, "b": 2.0}, "poisoned", {"a": 3.0, "b": 0.0}], 10, 90, 20)
    after = sampled(4, [{"a": 1.0, "b": 2.0}, {"a": -99.0, "b": 0.0}, {"a": 2.0, "b": 2.0}], 10, 80, 30)
    verdict = compare(before, after, before.logprobs, {"a": 1.0, "b": 0.5}, LIMITS)
    assert verdict.promote
    assert verdict.metrics == {
        "reward": 2.5,
        "reward_current": 2.5,
        "kl": 0.0,
        "response_tokens": 40.0,
        "response_tokens_current": 40.0,
        "prompts": 2.0,
        "reward/a": 1.5,
        "reward_current/a": 2.0,
        "reward/b": 2.0,
        "reward_current/b": 1.0,
    }


def test_a_candidate_that_cannot_be_scored_where_the_current_version_can_is_refused() -> None:
    good: list[dict[str, float] | str] = [{"a": 1.0}, {"a": 1.0}]
    before = sampled(3, good, 10, 10)
    verdict = compare(before, sampled(4, [{"a": 9.0}, "empty"], 10, 10), before.logprobs, {"a": 1.0}, LIMITS)
    assert (verdict.promote, verdict.reason) == (False, "1 of 2 responses cannot be scored; the first: empty")
    verdict = compare(before, sampled(4, ["empty", "empty"], 10, 10), before.logprobs, {"a": 1.0}, LIMITS)
    assert (verdict.promote, verdict.reason) == (False, "2 of 2 responses cannot be scored; the first: empty")
    assert "reward" not in verdict.metrics  # there is none, and JSON has no NaN
    with pytest.raises(ValueError, match="no response of version 3 can be scored; the first: empty"):
        compare(sampled(3, ["empty", "empty"], 10, 10), sampled(4, good, 10, 10), before.logprobs, {"a": 1.0}, LIMITS)


def test_a_candidate_that_would_never_have_said_it_is_refused() -> None:
    before = sampled(3, [{"a": 1.0}], 10)
    verdict = compare(before, sampled(4, [{"a": 1.0}], 10), [[-math.inf] * 10], {"a": 1.0}, LIMITS)
    assert (verdict.promote, verdict.reason) == (False, "inf nats a response from the current version (max_kl 2)")
    assert "kl" not in verdict.metrics
