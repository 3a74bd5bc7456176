"""Losses against the papers' formulas in Python floats, and what must not change them."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.loss import policy_loss, value_loss

JUNK = [math.nan, math.inf, -math.inf, 1e30]
MASK_TYPES = [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16]
COEFFICIENTS = {"clip_low": 0.2, "clip_high": 0.3, "behavior_weight_cap": 1.5}


def _batch(seed=0, num_rows=4, num_tokens=6, dtype=torch.float32):
    """Log-probs far enough apart that clips and caps bind on some tokens; a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    policy, proximal, behavior, advantages = torch.randn(
        4, num_rows, num_tokens, generator=generator, dtype=torch.float64
    ).to(dtype)
    lengths = torch.randint(0, num_tokens + 1, (num_rows, 1), generator=generator)
    lengths[0] = num_tokens
    mask = torch.arange(num_tokens) < lengths
    return [0.3 * policy - 2, 0.3 * proximal - 2, 0.5 * behavior - 2, advantages], mask


def _policy(inputs, mask, num_tokens=None, **changes: Any):
    num_tokens = int((mask != 0).sum()) if num_tokens is None else num_tokens
    policy, proximal, behavior, advantages = inputs
    coefficients: dict[str, Any] = COEFFICIENTS | changes
    return policy_loss(policy, proximal, behavior, advantages, mask, **coefficients, num_tokens=num_tokens)


def _value(inputs, mask, num_tokens=None, clip=0.4):
    num_tokens = int((mask != 0).sum()) if num_tokens is None else num_tokens
    values, old_values, returns = inputs[:3]
    return value_loss(values, old_values, returns, mask, clip=clip, num_tokens=num_tokens)


LOSSES: list[Any] = [_policy, _value]


def _policy_term_by_hand(policy, proximal, behavior, advantage):
    """Hilton et al. 2022, one token."""
    ratio = math.exp(policy - proximal)
    weight = min(math.exp(proximal - behavior), 1.5)
    return weight * min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)


def _value_term_by_hand(value, old, target):
    clipped = min(max(value, old - 0.4), old + 0.4)
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


@pytest.mark.parametrize(
    ("loss_of", "by_hand", "sign"),
    [(_policy, _policy_term_by_hand, -1), (_value, _value_term_by_hand, 1)],
)
@pytest.mark.parametrize("seed", range(5))
def test_losses_are_the_papers_sums(loss_of, by_hand, sign, seed):
    inputs, mask = _batch(seed)
    loss, _ = loss_of(inputs, mask, num_tokens=11)
    num_inputs = 4 if sign < 0 else 3
    total = sum(by_hand(*(x[b, t].item() for x in inputs[:num_inputs])) for b, t in mask.nonzero().tolist())
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sign * total / 11, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    junk=st.sampled_from(JUNK),
    mask_type=st.sampled_from(MASK_TYPES),
    loss_of=st.sampled_from(LOSSES),
)
def test_padding_and_mask_type_change_no_loss_stat_or_gradient(seed, junk, mask_type, loss_of):
    inputs, mask = _batch(seed)
    clean = [x.masked_fill(~mask, 0.5) for x in inputs]
    dirty = [x.masked_fill(~mask, junk) for x in inputs]
    clean[0].requires_grad_()
    dirty[0].requires_grad_()
    loss, stats = loss_of(clean, mask)
    dirty_loss, dirty_stats = loss_of(dirty, mask.to(mask_type))
    loss.backward()
    dirty_loss.backward()
    assert loss.isfinite()
    assert torch.equal(loss, dirty_loss)
    assert torch.equal(clean[0].grad, dirty[0].grad)
    assert (dirty[0].grad[~mask] == 0).all()
    assert stats.keys() == dirty_stats.keys()
    assert all(torch.equal(stats[key], dirty_stats[key]) for key in stats)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.sets(st.integers(1, 3)),
    loss_of=st.sampled_from(LOSSES),
)
def test_micro_batches_add_up_to_the_whole(seed, cuts, loss_of):
    inputs, mask = _batch(seed, dtype=torch.float64)
    num_tokens = int(mask.sum())
    inputs[0].requires_grad_()
    whole, whole_stats = loss_of(inputs, mask, num_tokens)
    (whole_grad,) = torch.autograd.grad(whole, inputs[0])
    edges = [0, *sorted(cuts), 4]
    total, stats = torch.zeros((), dtype=torch.float64), []
    for start, stop in itertools.pairwise(edges):
        part, part_stats = loss_of([x[start:stop] for x in inputs], mask[start:stop], num_tokens)
        total = total + part
        stats.append(part_stats)
    (total_grad,) = torch.autograd.grad(total, inputs[0])
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(total_grad, whole_grad)
    for key, value in whole_stats.items():
        parts = torch.stack([s[key] for s in stats])
        combined = parts.max() if key.endswith("_max") else parts.sum()
        torch.testing.assert_close(combined, value)
        assert not value.requires_grad
        assert value.shape == ()


@pytest.mark.parametrize("loss_of", LOSSES)
def test_gradcheck_and_no_gradient_to_anything_but_the_trained_input(loss_of):
    inputs, mask = _batch(3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda x: loss_of([x, *inputs[1:]], mask)[0], inputs[0])
    loss_of(inputs, mask)[0].backward()
    assert inputs[0].grad.abs().sum() > 0
    assert all(x.grad is None for x in inputs[1:])


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    inputs, mask = _batch(1)
    policy, _, _, advantages = inputs
    policy.requires_grad_()
    loss, stats = _policy([policy, policy.detach(), policy.detach(), advantages], mask)
    loss.backward()
    # d/dθ of -Σ A log π / N
    torch.testing.assert_close(policy.grad, torch.where(mask, -advantages / mask.sum(), 0))
    assert stats["clipped_tokens"] == stats["approx_kl_sum"] == stats["truncated_weights"] == 0
    assert stats["ratio_max"] == 1
    assert stats["tokens"] == stats["behavior_weight_sum"] == mask.sum()


def test_policy_loss_literal_numbers():
    # Ratios 2, 2, 0.5, 0.5 with advantages +1, -1, +1, -1, clip [0.8, 1.3]; weights 1.
    log_ratio = torch.tensor([[2.0, 2.0, 0.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    zeros = torch.zeros(1, 4)
    loss, stats = _policy([log_ratio, zeros, zeros, advantages], torch.ones(1, 4))
    (grad,) = torch.autograd.grad(loss, log_ratio)
    assert loss.item() == pytest.approx(-(1.3 - 2 + 0.5 - 0.8) / 4)
    # Clipped where the ratio has already gone the way the advantage pulls, and there only.
    assert grad[0].tolist() == pytest.approx([0, 2 / 4, -0.5 / 4, 0])
    assert stats["clipped_tokens"] == 2
    assert stats["tokens"] == 4
    assert stats["ratio_max"].item() == pytest.approx(2)
    k3 = (2 - 1 - math.log(2)) * 2 + (0.5 - 1 - math.log(0.5)) * 2
    assert stats["approx_kl_sum"].item() == pytest.approx(k3, rel=1e-5)


def test_behavior_weight_is_truncated_in_log_space():
    # proximal / behavior: e^0.1, infinite, 0, e^100 (overflows float32); cap 1.5.
    proximal = torch.tensor([[-1.0, -1.0, -math.inf, -1.0]])
    behavior = torch.tensor([[-1.1, -math.inf, -1.0, -101.0]])
    policy = torch.tensor([[-1.0, -1.0, -1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    loss, stats = _policy([policy, proximal, behavior, advantages], torch.ones(1, 4))
    (grad,) = torch.autograd.grad(loss, policy)
    weights = [math.exp(0.1), 1.5, 0.0, 1.5]
    assert loss.item() == pytest.approx(-(weights[0] + weights[3]) / 4, rel=1e-5)
    assert grad[0].tolist() == pytest.approx([-weights[0] / 4, 0, 0, -1.5 / 4], rel=1e-5)
    assert stats["truncated_weights"] == 2
    assert stats["behavior_weight_sum"].item() == pytest.approx(sum(weights), rel=1e-5)


@pytest.mark.parametrize(("cap", "truncated"), [(1.0, 0), (0.5, 2)])
def test_a_weight_at_the_cap_is_not_truncated_and_padding_never_counts(cap, truncated):
    zeros = torch.zeros(1, 3)
    _, stats = _policy([zeros] * 4, torch.tensor([[1, 1, 0]]), behavior_weight_cap=cap)
    assert stats["truncated_weights"] == truncated
    assert stats["behavior_weight_sum"].item() == pytest.approx(2 * cap)


@pytest.mark.parametrize("loss_of", LOSSES)
def test_nan_in_a_sampled_token_is_not_hidden(loss_of):
    inputs, mask = _batch()
    inputs[0][0, 0] = math.nan
    assert loss_of(inputs, mask)[0].isnan()


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("log_ratio", [1e4, math.inf, -1e4, -math.inf])
def test_a_ratio_that_would_overflow_stays_finite(advantage, log_ratio):
    policy = torch.tensor([[log_ratio, -1.0]], requires_grad=True)
    proximal = torch.tensor([[0.0, -1.0]])
    loss, stats = _policy([policy, proximal, proximal, torch.full((1, 2), advantage)], torch.ones(1, 2))
    (grad,) = torch.autograd.grad(loss, policy)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert all(value.isfinite() for value in stats.values())
    assert grad[0, 1].item() == pytest.approx(-advantage / 2)


def test_value_loss_literal_numbers():
    # old 0, clip 0.5. V=1, R=3: clipped to 0.5, error 2.5² wins and has no gradient.
    # V=1, R=-1: error 2² wins over 1.5², gradient stays. V=0.2: inside, ordinary.
    values = torch.tensor([[1.0, 1.0, 0.2]], requires_grad=True)
    loss, stats = value_loss(
        values,
        torch.zeros(1, 3),
        torch.tensor([[3.0, -1.0, 1.2]]),
        torch.ones(1, 3),
        clip=0.5,
        num_tokens=3,
    )
    (grad,) = torch.autograd.grad(loss, values)
    assert loss.item() == pytest.approx(0.5 * (6.25 + 4 + 1) / 3)
    assert grad[0].tolist() == pytest.approx([0, 2 / 3, -1 / 3])
    assert stats["clipped_values"] == 1
    assert stats["value_error_squared_sum"].item() == pytest.approx(4 + 4 + 1)


def test_value_clip_can_be_turned_off():
    inputs, mask = _batch(2)
    loss, stats = _value(inputs, mask, clip=math.inf)
    values, _, returns, _ = inputs
    expected = 0.5 * ((values - returns)[mask] ** 2).mean()
    torch.testing.assert_close(loss, expected)
    assert stats["clipped_values"] == 0


@pytest.mark.parametrize("loss_of", LOSSES)
@pytest.mark.parametrize("num_rows", [0, 2])
def test_a_micro_batch_without_tokens_is_zero_and_still_has_a_gradient(loss_of, num_rows):
    inputs = [torch.full((num_rows, 3), math.nan, requires_grad=True) for _ in range(4)]
    loss, stats = loss_of(inputs, torch.zeros(num_rows, 3), num_tokens=7)
    (grad,) = torch.autograd.grad(loss, inputs[0])
    assert loss == 0
    assert torch.equal(grad, torch.zeros(num_rows, 3))
    assert all(value == 0 for value in stats.values())


# Errors


def test_losses_refuse_bad_input():
    inputs, mask = _batch()
    for name, value in {
        "clip_low": -0.1,
        "clip_high": math.nan,
        "behavior_weight_cap": math.inf,
        "num_tokens": 0,
    }.items():
        with pytest.raises(ValueError, match=f"{name} is"):
            _policy(inputs, mask, **{name: value})
    with pytest.raises(ValueError, match="behavior_weight_cap"):
        _policy(inputs, mask, behavior_weight_cap=0.0)
    with pytest.raises(ValueError, match="advantages_BT"):
        _policy([*inputs[:3], inputs[3][:, :1]], mask)
    with pytest.raises(ValueError, match="clip is -1"):
        _value(inputs, mask, clip=-1)
    with pytest.raises(ValueError, match="num_tokens"):
        _value(inputs, mask, num_tokens=-3)
    with pytest.raises(ValueError, match="returns_BT"):
        _value([*inputs[:2], inputs[2][:1]], mask)
    with pytest.raises(ValueError, match="token_weights_BT"):
        _policy(inputs, mask, token_weights_BT=torch.ones(1, 6))
