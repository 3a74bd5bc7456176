"""What the gate lets pass: literal limits, either way, and nothing that is no number."""

import math
from pathlib import Path

import pytest

from contracts.serving import GateConfig
from serving.gate import Measured, decide

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
