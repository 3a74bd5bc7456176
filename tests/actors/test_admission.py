"""What actors must not get away with: each answer that cannot be the response is refused, with the actor's name."""

from dataclasses import replace
from typing import Any

import pytest

from actors.admission import BadRollout, check_rollout
from actors.rollout import RolloutRequest
from contracts.records import Rollout

REQUEST = RolloutRequest("g1-0", "p1", "g1", [5, 6], max_tokens=4, temperature=1.0, seed=0)
GOOD = Rollout(
    trajectory_id="g1-0",
    prompt_id="p1",
    group_id="g1",
    prompt_tokens=[5, 6],
    response_tokens=[7, 0, 99],
    response_text="text",
    behavior_logprobs=[-1.0, 0.0, -30.0],
    weights_versions=[3, 4, 4],
    finish_reason="stop",
    actor_id="rollout-2",
)


def check(rollout: Rollout) -> None:
    check_rollout(rollout, REQUEST, actor_id="rollout-2", newest_version=4, vocabulary=100)


def tampered(**fields: Any) -> Rollout:
    """As it arrives from another process: unpickled, so that its own checks do not run."""
    rollout = replace(GOOD)
    for name, value in fields.items():
        object.__setattr__(rollout, name, value)
    return rollout


def test_a_good_answer_passes() -> None:
    check(GOOD)


def test_an_answer_without_tokens_is_left_to_the_learners_check() -> None:
    check(tampered(response_tokens=[], behavior_logprobs=[], weights_versions=[]))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"trajectory_id": "g1-1"}, "another trajectory_id"),
        ({"prompt_id": "p2"}, "another prompt_id"),
        ({"group_id": "g2"}, "another group_id"),
        ({"prompt_tokens": [5, 7]}, "another prompt_tokens"),
        ({"behavior_logprobs": [-1.0, -1.0]}, "2 behavior_logprobs for 3 response tokens"),
        ({"behavior_logprobs": [-1.0] * 4}, "4 behavior_logprobs for 3 response tokens"),
        ({"weights_versions": [3, 4]}, "2 weights_versions for 3 response tokens"),
        ({"response_tokens": [7, 8, 100]}, "token ids outside of the vocabulary of 100"),
        ({"response_tokens": [7, -1, 9]}, "token ids outside of the vocabulary of 100"),
        ({"behavior_logprobs": [-1.0, 0.5, -1.0]}, "a log-probability above 0"),
        ({"weights_versions": [4, 4, 5]}, "weights version 5, the newest is 4"),
        ({"weights_versions": [4, 3, 4]}, "weights versions that go back"),
        ({"finish_reason": "abort"}, "finish_reason 'abort'"),
        (
            {"response_tokens": [1] * 5, "behavior_logprobs": [-1.0] * 5, "weights_versions": [4] * 5},
            "5 tokens, 4 were allowed",
        ),
    ],
)
def test_what_cannot_be_the_response_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRollout) as refused:
        check(tampered(**fields))
    assert str(refused.value) == f"rollout-2 answered g1-0 with {reason}"
