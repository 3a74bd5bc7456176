"""KL estimates, KL and entropy in the loss, and what their gradients descend, by enumeration."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantage import gae, shape_rewards
from learner.loss import MAX_LOG_RATIO, entropy_bonus, kl, kl_penalty_loss, policy_loss

JUNK = [math.nan, math.inf, -math.inf, 1e30]
NO_CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "behavior_weight_cap": 2.0}  # at ratio and weight 1


def _batch(seed=0, num_rows=4, num_tokens=6, dtype=torch.float32):
    """Log-probs of policy and reference, and a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, num_rows, num_tokens, generator=generator, dtype=torch.float64).to(dtype)
    lengths = torch.randint(0, num_tokens + 1, (num_rows, 1), generator=generator)
    lengths[0] = num_tokens
    return 0.3 * policy - 2, 0.3 * reference - 2, torch.arange(num_tokens) < lengths


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
    policy, reference, mask = _batch(5)
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
    policy, reference, _ = _batch(6, dtype=torch.float64)
    reference.requires_grad_()
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl(x, reference, estimator=estimator), policy)
    kl(policy, reference, estimator=estimator).sum().backward()
    assert reference.grad is None


def test_kl_refuses_bad_input():
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="estimator is 'k4', allowed are k1, k2, k3"):
        kl(zeros, zeros, estimator="k4")
    with pytest.raises(ValueError, match="reference_logprobs_BT"):
        kl(zeros, zeros[:, :1], estimator="k1")


# KL in the loss


def _k_by_hand(policy, reference, estimator):
    gap = reference - policy
    return gap**2 / 2 if estimator == "k2" else math.exp(gap) - 1 - gap


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("seed", range(3))
def test_kl_penalty_is_the_weighted_sum_over_valid_tokens(estimator, seed):
    policy, reference, mask = _batch(seed)
    weights = torch.rand(mask.shape)
    junk = mask.logical_not()
    loss, stats = kl_penalty_loss(
        policy.masked_fill(junk, math.nan).requires_grad_(),
        reference.masked_fill(junk, math.inf),
        mask.int(),
        estimator=estimator,
        num_tokens=11,
        token_weights_BT=weights.masked_fill(junk, math.nan),
    )
    valid = mask.nonzero().tolist()
    pairs = [(policy[b, t].item(), reference[b, t].item()) for b, t in valid]
    slow = [_k_by_hand(*pair, estimator) * weights[b, t].item() for pair, (b, t) in zip(pairs, valid, strict=True)]
    assert loss.item() == pytest.approx(sum(slow) / 11, rel=1e-4)
    assert loss.dtype == torch.float32
    assert stats["reference_kl_sum"].item() == pytest.approx(sum(p - r for p, r in pairs), rel=1e-4, abs=1e-5)
    assert stats["reference_log_ratio_max"].item() == pytest.approx(max(abs(p - r) for p, r in pairs))
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_penalty_gradient_is_clean_and_adds_up_over_flat_chunks(estimator):
    policy, reference, mask = _batch(7, dtype=torch.float64)
    policy.masked_fill_(~mask, math.nan).requires_grad_()
    reference.masked_fill_(~mask, math.inf).requires_grad_()
    num_tokens = int(mask.sum())

    def penalty(p, r, m):
        return kl_penalty_loss(p, r, m, estimator=estimator, num_tokens=num_tokens)[0]

    (whole,) = torch.autograd.grad(penalty(policy, reference, mask), policy)
    assert whole.isfinite().all()
    assert (whole[~mask] == 0).all()
    edges = [0, 2, 5, num_tokens]
    flat, flat_reference = policy[mask][None], reference[mask][None]
    parts = [penalty(flat[:, i:j], flat_reference[:, i:j], torch.ones(1, j - i)) for i, j in itertools.pairwise(edges)]
    torch.stack(parts).sum().backward()
    torch.testing.assert_close(policy.grad, whole)
    assert reference.grad is None


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("num_rows", [0, 2])
def test_a_kl_penalty_without_tokens_is_zero(estimator, num_rows):
    policy = torch.full((num_rows, 3), math.nan, requires_grad=True)
    loss, stats = kl_penalty_loss(policy, policy, torch.zeros(num_rows, 3), estimator=estimator, num_tokens=5)
    (grad,) = torch.autograd.grad(loss, policy)
    assert loss == 0
    assert torch.equal(grad, torch.zeros(num_rows, 3))
    assert all(value == 0 for value in stats.values())


def test_kl_penalty_refuses_bad_input():
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="estimator is 'k1', whose expected gradient is zero"):
        kl_penalty_loss(zeros, zeros, zeros, estimator="k1", num_tokens=1)
    with pytest.raises(ValueError, match="estimator is 'kl', allowed in a loss are k2, k3"):
        kl_penalty_loss(zeros, zeros, zeros, estimator="kl", num_tokens=1)
    with pytest.raises(ValueError, match="num_tokens is 0"):
        kl_penalty_loss(zeros, zeros, zeros, estimator="k2", num_tokens=0)
    with pytest.raises(ValueError, match="reference_logprobs_BT"):
        kl_penalty_loss(zeros, zeros[:1], zeros, estimator="k2", num_tokens=1)
    with pytest.raises(ValueError, match="token_weights_BT"):
        kl_penalty_loss(zeros, zeros, zeros, estimator="k2", num_tokens=1, token_weights_BT=zeros[:1])


# What the gradients descend: expectations over every action, each action's gradient by backward.


def _expected_gradient(logits, sampler, loss_of_action):
    """Σ_a sampler(a) · ∇ loss(log p(a)), one action at a time."""
    total = torch.zeros_like(logits)
    for action, probability in enumerate(sampler.tolist()):
        logprob = logits.log_softmax(-1)[action].reshape(1, 1)
        (gradient,) = torch.autograd.grad(loss_of_action(action, logprob), logits)
        total += probability * gradient
    return total


def _assert_exact(gradient, expected):
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def _three_categoricals(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, reference, sampler = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(-1), sampler.softmax(-1)


def _reverse_kl_gradient(logits, reference):
    """∇ KL(p || q) for a softmax, on paper: p_i · (log p_i/q_i - KL)."""
    p, gap = logits.softmax(-1).detach(), logits.log_softmax(-1).detach() - reference
    return p * (gap - (p * gap).sum())


def _penalty_of_action(reference, estimator, weights=None):
    def loss(action, logprob):
        weight = None if weights is None else weights[action].reshape(1, 1)
        reference_logprob = reference[action].reshape(1, 1)
        mask = torch.ones(1, 1)
        return kl_penalty_loss(
            logprob, reference_logprob, mask, estimator=estimator, num_tokens=1, token_weights_BT=weight
        )[0]

    return loss


@pytest.mark.parametrize("seed", range(5))
def test_expected_gradients_on_policy_are_those_the_docstring_names(seed):
    logits, reference, _ = _three_categoricals(seed)
    p = logits.softmax(-1).detach()
    reverse, forward = _reverse_kl_gradient(logits, reference), p - reference.exp()  # ∇ KL(q || p) = p - q
    assert (reverse - forward).abs().max() > 0.05  # else the claims below could not be told apart

    def naive(action, logprob):
        return kl(logprob, reference[action].reshape(1, 1), estimator="k1").sum()

    def in_reward(action, logprob):
        fixed, mask = logprob.detach(), torch.ones(1, 1)
        penalty = kl(fixed, reference[action].reshape(1, 1), estimator="k1")
        reward = shape_rewards(torch.zeros(1), penalty, mask, kl_coef=1.0)
        return policy_loss(logprob, fixed, fixed, reward, mask, **NO_CLIP, num_tokens=1)[0]

    _assert_exact(_expected_gradient(logits, p, naive), torch.zeros_like(p))
    _assert_exact(_expected_gradient(logits, p, in_reward), reverse)
    _assert_exact(_expected_gradient(logits, p, _penalty_of_action(reference, "k2")), reverse)
    _assert_exact(_expected_gradient(logits, p, _penalty_of_action(reference, "k3")), forward)


@pytest.mark.parametrize("seed", range(5))
def test_off_policy_the_ratio_as_a_token_weight_restores_the_gradients(seed):
    logits, reference, behavior = _three_categoricals(seed)
    p = logits.softmax(-1)
    for estimator, exact in (
        ("k2", _reverse_kl_gradient(logits, reference)),
        ("k3", p.detach() - reference.exp()),
    ):
        corrected = _expected_gradient(logits, behavior, _penalty_of_action(reference, estimator, p / behavior))
        _assert_exact(corrected, exact)
        biased = _expected_gradient(logits, behavior, _penalty_of_action(reference, estimator))
        assert (biased - exact).abs().max() > 0.01


def test_over_two_tokens_kl_in_the_reward_is_the_sequences_kl_and_k2_that_of_each_state():
    """Three first tokens, each its own state for the second: nine responses, weighed by their probability."""
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    scores = torch.randn(9, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    first, second = torch.arange(9) // 3, torch.arange(9) % 3

    def of_responses(log_p):
        return torch.stack([log_p[0, first], log_p[1 + first, second]], dim=1)

    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    policy, fixed, mask = of_responses(log_p), of_responses(log_p).detach(), torch.ones(9, 2)
    weights = fixed.sum(1, keepdim=True).exp().expand(9, 2)
    state_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    visits = log_p[0].exp()
    exact_kl = state_kl[0] + (visits * state_kl[1:]).sum()
    exact_score = (of_responses(log_p).sum(1).exp() * scores).sum()

    rewards = shape_rewards(scores, fixed - of_responses(log_q), mask, kl_coef=0.7)
    advantages, _ = gae(rewards, torch.zeros(9, 2), mask, gamma=1, lam=1)
    loss, _ = policy_loss(policy, fixed, fixed, advantages, mask, **NO_CLIP, num_tokens=1, token_weights_BT=weights)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(0.7 * exact_kl - exact_score, logits, retain_graph=True)
    _assert_exact(gradient, exact)

    penalty, _ = kl_penalty_loss(
        policy, of_responses(log_q), mask, estimator="k2", num_tokens=1, token_weights_BT=weights
    )
    (gradient,) = torch.autograd.grad(penalty, logits, retain_graph=True)
    (own_states,) = torch.autograd.grad(state_kl[0] + (visits.detach() * state_kl[1:]).sum(), logits)
    _assert_exact(gradient, own_states)


# Entropy bonus


def test_entropy_bonus_literal_numbers():
    entropy = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, math.nan]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = entropy_bonus(entropy, mask, num_tokens=4)
    (grad,) = torch.autograd.grad(loss, entropy)
    assert loss.item() == pytest.approx(-7 / 4)
    assert grad.tolist() == [[-0.25, -0.25, 0], [-0.25, 0, 0]]
    weights = torch.tensor([[0.5, 1.0, math.nan], [3.0, 1.0, 1.0]])
    assert entropy_bonus(entropy, mask, num_tokens=4, token_weights_BT=weights).item() == pytest.approx(-14.5 / 4)
    assert entropy_bonus(entropy, torch.zeros(2, 3), num_tokens=4) == 0


def test_descending_the_entropy_bonus_raises_the_entropy():
    logits = torch.tensor([[[2.0, 0.0, -1.0]]], requires_grad=True)

    def entropy_of(logits):
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    before = entropy_of(logits)
    (grad,) = torch.autograd.grad(entropy_bonus(before, torch.ones(1, 1), num_tokens=1), logits)
    assert entropy_of(logits - 0.1 * grad).item() > before.item() + 1e-3


def test_entropy_bonus_refuses_bad_input():
    with pytest.raises(ValueError, match="num_tokens is 0"):
        entropy_bonus(torch.zeros(1, 2), torch.ones(1, 2), num_tokens=0)
    with pytest.raises(ValueError, match="entropy_BT"):
        entropy_bonus(torch.zeros(1, 3), torch.ones(1, 2), num_tokens=1)
