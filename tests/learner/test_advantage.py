"""Advantages against sums written straight from the papers, in Python floats."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantage import gae, overlong_penalty, shape_rewards, whiten

JUNK = [math.nan, math.inf, -math.inf, 1e30]
MASK_TYPES = [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16]


def _mask(lengths, num_tokens, dtype=torch.bool):
    return (torch.arange(num_tokens) < torch.tensor(lengths)[:, None]).to(dtype)


def _gae_by_double_sum(rewards, values, bootstrap, gamma, lam):
    """One response without padding: eq. 16, delta by delta."""
    values = [*values, bootstrap]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@st.composite
def batches(draw):
    num_tokens = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(0, num_tokens), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rewards, values = torch.randn(2, len(lengths), num_tokens, generator=generator)
    bootstrap = torch.randn(len(lengths), generator=generator)
    return lengths, rewards, values, bootstrap


@settings(max_examples=40, deadline=None)
@given(
    batch=batches(),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    junk=st.sampled_from(JUNK),
    mask_type=st.sampled_from(MASK_TYPES),
)
def test_gae_is_the_double_sum_whatever_padding_holds(batch, gamma, lam, junk, mask_type):
    lengths, rewards, values, bootstrap = batch
    valid = _mask(lengths, rewards.shape[1])
    advantages, returns = gae(
        rewards.masked_fill(~valid, junk),
        values.masked_fill(~valid, junk),
        valid.to(mask_type),
        gamma=gamma,
        lam=lam,
        bootstrap_B=bootstrap,
    )
    assert advantages.dtype == returns.dtype == torch.float32
    for b, length in enumerate(lengths):
        slow = _gae_by_double_sum(
            rewards[b, :length].tolist(),
            values[b, :length].tolist(),
            bootstrap[b].item(),
            gamma,
            lam,
        )
        assert advantages[b, :length].tolist() == pytest.approx(slow, abs=1e-5)
        slow_returns = [a + v for a, v in zip(slow, values[b, :length].tolist(), strict=True)]
        assert returns[b, :length].tolist() == pytest.approx(slow_returns, abs=1e-5)
    assert (advantages[~valid] == 0).all()
    assert (returns[~valid] == 0).all()


def test_gae_literal_numbers():
    # delta = [0 + 0.5*2 - 1, 4 + 0 - 2] = [0, 2]; advantage_0 = 0 + 0.5*0.5*2
    advantages, returns = gae(
        torch.tensor([[0.0, 4.0, 9.0]]),
        torch.tensor([[1.0, 2.0, 9.0]]),
        torch.tensor([[1, 1, 0]]),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.tolist() == [[0.5, 2.0, 0.0]]
    assert returns.tolist() == [[1.5, 4.0, 0.0]]


@settings(max_examples=20, deadline=None)
@given(batch=batches())
def test_gamma_and_lambda_1_is_return_minus_value(batch):
    lengths, rewards, values, _ = batch
    advantages, returns = gae(rewards, values, _mask(lengths, rewards.shape[1]), gamma=1, lam=1)
    for b, length in enumerate(lengths):
        for t in range(length):
            total = sum(rewards[b, t:length].tolist())
            assert returns[b, t].item() == pytest.approx(total, abs=1e-5)
            assert advantages[b, t].item() == pytest.approx(total - values[b, t].item(), abs=1e-5)


def test_lambda_0_is_the_one_step_error():
    advantages, _ = gae(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]), torch.ones(1, 2), gamma=0.5, lam=0)
    assert advantages.tolist() == [[1 + 2.5 - 3, 2 - 5]]


def test_bootstrap_changes_truncated_rows_only_and_enters_after_the_last_token():
    rewards, values = torch.zeros(3, 4), torch.zeros(3, 4)
    mask = _mask([2, 4, 3], 4)
    plain, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    boot, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap_B=torch.tensor([10.0, 0.0, 0.0]))
    assert torch.equal(plain[1:], boot[1:])
    assert boot[0].tolist() == pytest.approx([0.9 * 0.8 * 9.0, 9.0, 0.0, 0.0])
    assert torch.equal(returns, boot)
    none, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap_B=torch.zeros(3))
    assert torch.equal(none, plain)


def test_a_whole_row_of_padding_is_zero_even_with_a_bootstrap_of_nan():
    junk = torch.full((1, 3), math.nan)
    advantages, returns = gae(junk, junk, torch.zeros(1, 3), gamma=1, lam=1, bootstrap_B=torch.tensor([math.nan]))
    assert advantages.tolist() == returns.tolist() == [[0.0, 0.0, 0.0]]


def test_gae_gives_targets_without_gradient():
    values = torch.ones(1, 2, requires_grad=True)
    for target in gae(torch.ones(1, 2), values, torch.ones(1, 2), gamma=1, lam=1):
        assert not target.requires_grad


def test_gae_refuses_bad_input():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"gamma is 1\.5"):
        gae(x, x, mask, gamma=1.5, lam=1)
    with pytest.raises(ValueError, match="lam is nan"):
        gae(x, x, mask, gamma=1, lam=math.nan)
    with pytest.raises(ValueError, match="values_BT"):
        gae(x, x[:, :2], mask, gamma=1, lam=1)
    with pytest.raises(ValueError, match="bootstrap_B"):
        gae(x, x, mask, gamma=1, lam=1, bootstrap_B=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"mask_BT has a 1 after a 0 in rows \[1\]"):
        gae(x, x, torch.tensor([[1, 1, 0], [0, 1, 1]]), gamma=1, lam=1)


# Shaped rewards


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_shaped_rewards_literal_numbers(junk, mask_type):
    kl_BT = torch.tensor([[1.0, 2.0, junk], [4.0, junk, junk], [1.0, 1.0, 2.0]])
    mask = _mask([2, 1, 3], 3, mask_type)
    rewards = shape_rewards(torch.tensor([10.0, -1.0, 0.0]), kl_BT, mask, kl_coef=0.5)
    # The score sits on the last sampled token, not one slot after it.
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [-3.0, 0.0, 0.0], [-0.5, -0.5, -1.0]]
    assert rewards.dtype == torch.float32
    assert not rewards.requires_grad


def test_shaped_rewards_refuse_bad_input():
    with pytest.raises(ValueError, match=r"no sampled token in rows \[1\]"):
        shape_rewards(torch.ones(2), torch.zeros(2, 3), _mask([3, 0], 3), kl_coef=0.1)
    with pytest.raises(ValueError, match="scores_B"):
        shape_rewards(torch.ones(2, 3), torch.zeros(2, 3), _mask([3, 1], 3), kl_coef=0.1)
    with pytest.raises(ValueError, match="kl_BT"):
        shape_rewards(torch.ones(2), torch.zeros(2, 2), _mask([3, 1], 3), kl_coef=0.1)


# Whitening


@settings(max_examples=40, deadline=None)
@given(
    batch=batches(),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    shift=st.floats(-3, 3),
    junk=st.sampled_from(JUNK),
    mask_type=st.sampled_from(MASK_TYPES),
)
def test_whitened_tokens_have_mean_0_and_variance_1(batch, scale, shift, junk, mask_type):
    lengths, x, _, _ = batch
    valid = _mask(lengths, x.shape[1])
    x = (x + shift) * scale
    whitened = whiten(x.masked_fill(~valid, junk), valid.to(mask_type))
    assert whitened.dtype == torch.float32
    assert (whitened[~valid] == 0).all()
    kept, before = whitened[valid].tolist(), x[valid].tolist()
    if len(kept) < 2:
        assert kept == [0.0] * len(kept)
        return
    assert statistics.fmean(kept) == pytest.approx(0, abs=1e-5)
    assert statistics.pvariance(kept) == pytest.approx(1, rel=1e-4)
    mean, std = statistics.fmean(before), statistics.pstdev(before)
    assert kept == pytest.approx([(v - mean) / std for v in before], rel=1e-3, abs=1e-4)


def test_whiten_literal_numbers():
    # Valid: 1, 3, 5, 7: mean 4, variance 5.
    x = torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, -100.0]])
    whitened = whiten(x, _mask([2, 2], 3))
    third, first = 1 / math.sqrt(5), 3 / math.sqrt(5)
    assert whitened.flatten().tolist() == pytest.approx([-first, -third, 0, third, first, 0])


def test_whitening_the_batch_is_not_whitening_each_shard():
    x = torch.tensor([[1.0, 2.0], [11.0, 12.0]])
    mask = torch.ones(2, 2)
    whole = whiten(x, mask)
    shards = torch.cat([whiten(x[:1], mask[:1]), whiten(x[1:], mask[1:])])
    assert shards.tolist() == [[-1.0, 1.0], [-1.0, 1.0]]
    assert (whole[0] < 0).all()
    assert (whole[1] > 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-20, 3e38])
def test_whitening_equal_values_gives_zero(value):
    assert (whiten(torch.full((3, 7), value), torch.ones(3, 7)) == 0).all()


def test_whiten_takes_a_mask_with_gaps():
    assert whiten(torch.tensor([[9.0, 1.0, 9.0, 3.0]]), torch.tensor([[0, 1, 0, 1]])).tolist() == [
        [0.0, -1.0, 0.0, 1.0]
    ]


# Overlong penalty: DAPO, eq. 13


def _overlong_by_hand(length, max_tokens, buffer_tokens):
    if length <= max_tokens - buffer_tokens:
        return 0.0
    if length <= max_tokens:
        return ((max_tokens - buffer_tokens) - length) / buffer_tokens
    return -1.0


def test_overlong_penalty_literal_numbers():
    lengths = torch.tensor([0, 11, 12, 13, 14, 16, 17, 10**6])
    penalties = overlong_penalty(lengths, max_tokens=16, buffer_tokens=4, penalty=2.0)
    assert penalties.tolist() == [0, 0, 0, -0.5, -1, -2, -2, -2]
    assert penalties.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=8),
    limits=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    penalty=st.floats(0, 5),
)
def test_overlong_penalty_is_equation_13(lengths, limits, penalty):
    buffer_tokens, max_tokens = sorted(limits)
    penalties = overlong_penalty(
        torch.tensor(lengths, dtype=torch.long), max_tokens=max_tokens, buffer_tokens=buffer_tokens, penalty=penalty
    )
    slow = [penalty * _overlong_by_hand(length, max_tokens, buffer_tokens) for length in lengths]
    assert penalties.tolist() == pytest.approx(slow, abs=1e-6)


def test_overlong_penalty_refuses_bad_input():
    lengths = torch.ones(2)
    for buffer_tokens in (0, 9):
        with pytest.raises(ValueError, match=f"buffer_tokens is {buffer_tokens}, allowed is 1 to max_tokens = 8"):
            overlong_penalty(lengths, max_tokens=8, buffer_tokens=buffer_tokens, penalty=1)
    for penalty in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"penalty is {penalty}"):
            overlong_penalty(lengths, max_tokens=8, buffer_tokens=2, penalty=penalty)
    with pytest.raises(ValueError, match=r"lengths_B has shape \(1, 2\)"):
        overlong_penalty(lengths[None], max_tokens=8, buffer_tokens=2, penalty=1)
