"""Losses against the papers' formulas in Python floats, and what must not change them."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.loss import MAX_LOG_RATIO, kl, policy_loss, value_loss

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


# KL


def test_kl_literal_numbers():
    policy, reference = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    log2 = math.log(2)
    k1 = kl(policy, reference, estimator="k1")
    k2 = kl(policy, reference, estimator="k2")
    k3 = kl(policy, reference, estimator="k3")
    assert k1[0].tolist() == pytest.approx([log2, -log2])
    assert k2[0].tolist() == pytest.approx([log2**2 / 2] * 2)
    assert k3[0].tolist() == pytest.approx([0.5 - 1 + log2, 2 - 1 - log2], rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_k1_and_k3_are_unbiased_and_k2_nearly_so_for_close_policies(seed):
    """Expectations over the policy's whole vocabulary, enumerated."""
    generator = torch.Generator().manual_seed(seed)
    policy, noise = torch.randn(2, 1, 9, generator=generator, dtype=torch.float64)
    near = (policy + 0.05 * noise).log_softmax(-1)
    far, policy = (policy + noise).log_softmax(-1), policy.log_softmax(-1)
    for reference in (near, far):
        p, q = policy.exp()[0].tolist(), reference.exp()[0].tolist()
        exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        for estimator in ("k1", "k3"):
            mean = (policy.exp() * kl(policy, reference, estimator=estimator)).sum()
            assert mean.item() == pytest.approx(exact, rel=1e-6)
        if reference is near:
            k2 = (policy.exp() * kl(policy, near, estimator="k2")).sum()
            assert k2.item() == pytest.approx(exact, rel=0.2)


@settings(max_examples=200, deadline=None)
@given(
    policy=st.floats(-1e4, 0, width=32),
    gap=st.floats(-0.0009765625, 0.0009765625, width=32) | st.floats(-1e4, 1e4, width=32),
)
def test_k2_and_k3_are_never_negative_nor_infinite(policy, gap):
    logprobs = torch.tensor([[policy]])
    for estimator in ("k2", "k3"):
        value = kl(logprobs, logprobs + gap, estimator=estimator)
        assert 0 <= value.item() < math.inf


def test_k3_of_a_token_the_policy_gave_up_is_bounded():
    value = kl(torch.tensor([[-math.inf]]), torch.tensor([[-1.0]]), estimator="k3")
    assert value.item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("junk", JUNK)
def test_masked_kl_is_zero_in_padding_with_clean_gradients(estimator, junk):
    (policy, reference, _, _), mask = _batch(5)
    policy = policy.masked_fill(~mask, junk).requires_grad_()
    reference = reference.masked_fill(~mask, junk)
    value = kl(policy, reference, estimator=estimator, mask_BT=mask.float())
    value.sum().backward()
    assert value.dtype == torch.float32
    assert (value[~mask] == 0).all()
    assert (policy.grad[~mask] == 0).all()
    assert value.isfinite().all()
    assert policy.grad.isfinite().all()
    plain = kl(policy.detach(), reference, estimator=estimator)
    assert torch.equal(value.detach()[mask], plain[mask])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_gradcheck(estimator):
    (policy, reference, _, _), _ = _batch(6, dtype=torch.float64)
    reference.requires_grad_()
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl(x, reference, estimator=estimator), policy)
    kl(policy, reference, estimator=estimator).sum().backward()
    assert reference.grad is None


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
    with pytest.raises(ValueError, match="estimator is 'k4', allowed are k1, k2, k3"):
        kl(inputs[0], inputs[1], estimator="k4")
    with pytest.raises(ValueError, match="reference_logprobs_BT"):
        kl(inputs[0], inputs[1][:, :1], estimator="k1")
