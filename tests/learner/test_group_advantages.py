"""Group baselines against sums written straight from the papers, and the groups that have none."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantage import equal_groups, group_advantages

# Group baselines: rewards 1, 5, 3 of group 7 and 2, 4 of group 3, in mixed order.

REWARDS = torch.tensor([1.0, 2.0, 5.0, 4.0, 3.0])
GROUPS = torch.tensor([7, 3, 7, 3, 7])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("dr_grpo", [-2, -1, 2, 1, 0]),
        ("rloo", [1 - 4, 2 - 4, 5 - 2, 4 - 2, 3 - 3]),
        ("grpo", [-1, -1 / math.sqrt(2), 1, 1 / math.sqrt(2), 0]),
        ("reinforce++", [x / math.sqrt(2.5) for x in (-2, -1, 2, 1, 0)]),
    ],
)
def test_group_advantages_literal_numbers(method, expected):
    advantages = group_advantages(REWARDS, GROUPS, method=method)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(-50, 50)), min_size=2, max_size=12),
    method=st.sampled_from(["grpo", "dr_grpo", "rloo", "reinforce++"]),
)
def test_group_advantages_by_hand(rows, method):
    advantages = group_advantages(
        torch.tensor([r / 10 for _, r in rows]), torch.tensor([g for g, _ in rows]), method=method
    ).tolist()
    for i, (group, reward) in enumerate(rows):
        same = [r / 10 for g, r in rows if method == "reinforce++" or g == group]
        others = [r / 10 for j, (g, r) in enumerate(rows) if g == group and j != i]
        slow = reward / 10 - statistics.fmean(same)
        if method == "rloo":
            slow = reward / 10 - statistics.fmean(others) if others else 0.0
        elif method != "dr_grpo" and len(set(same)) > 1:
            slow /= statistics.stdev(same)
        assert advantages[i] == pytest.approx(slow, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_and_lone_responses_get_zero(method):
    advantages = group_advantages(
        torch.tensor([0.1, 0.1, 0.1, 8.0, 1.0, 2.0]),
        torch.tensor([0, 0, 0, 1, 2, 2]),
        method=method,
    )
    assert advantages[:4].tolist() == [0.0] * 4
    assert advantages[4] < 0 < advantages[5]


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_a_batch_of_equal_rewards_gets_zero(method):
    assert group_advantages(torch.full((6,), 0.3), torch.arange(6) // 2, method=method).eq(0).all()


def test_noise_in_the_last_bits_is_not_amplified():
    rewards = torch.tensor([1.0, 1.0 + 2**-23])
    assert group_advantages(rewards, torch.zeros(2, dtype=torch.long), method="grpo").abs().max() < 0.1


def test_group_advantages_refuse_bad_input():
    with pytest.raises(ValueError, match="method is 'ppo', allowed are grpo"):
        group_advantages(REWARDS, GROUPS, method="ppo")
    with pytest.raises(ValueError, match="group_ids_R"):
        group_advantages(REWARDS, GROUPS[:-1], method="grpo")
    with pytest.raises(ValueError, match=r"not finite at \[1\]"):
        group_advantages(torch.tensor([0.0, math.nan]), torch.tensor([0, 1]), method="grpo")


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_no_responses_have_no_advantages(method):
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), method=method).tolist() == []


# Dynamic sampling: groups without variance


def test_equal_groups_literal_numbers():
    # Group 5: 1, 1; group 0: 0, 1; group 9: alone; group 2: 0.3 three times.
    rewards = torch.tensor([1.0, 0.0, 0.3, 1.0, 7.0, 0.3, 1.0, 0.3])
    groups = torch.tensor([5, 0, 2, 5, 9, 2, 0, 2])
    equal = equal_groups(rewards, groups)
    assert equal.tolist() == [True, False, True, True, True, True, False, True]
    assert equal.dtype == torch.bool
    assert equal_groups(rewards[:0], groups[:0]).tolist() == []


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(-2, 2), st.integers(-1, 1)), max_size=12))
def test_equal_groups_are_those_with_one_distinct_reward(rows):
    equal = equal_groups(
        torch.tensor([r / 10 for _, r in rows]), torch.tensor([g for g, _ in rows], dtype=torch.long)
    ).tolist()
    assert equal == [len({r for g, r in rows if g == group}) == 1 for group, _ in rows]


@pytest.mark.parametrize("size", [0.3, -1.0, 1.0, 77.7, -1e4, 1e30])
def test_equal_means_equal_but_for_the_last_bits_whatever_the_size(size):
    """The noise of summation order is dropped, a real difference of a thousandth is not."""
    one = torch.tensor([size, size])
    noisy = torch.nextafter(one, torch.tensor([math.inf, -math.inf]))  # two units in the last place apart
    groups = torch.zeros(2, dtype=torch.long)
    assert equal_groups(noisy, groups).all()
    assert not equal_groups(one * torch.tensor([1.0, 1.001]), groups).any()
    assert group_advantages(noisy / abs(size), groups, method="grpo").abs().max() < 0.2


def test_equal_groups_refuse_bad_input():
    with pytest.raises(ValueError, match="group_ids_R"):
        equal_groups(REWARDS, GROUPS[:-1])
    with pytest.raises(ValueError, match=r"not finite at \[0\]"):
        equal_groups(torch.tensor([math.nan, 1.0]), torch.tensor([0, 1]))
