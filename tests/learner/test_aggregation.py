"""Averages over tokens and responses, and weights of whole responses, against sums in Python floats."""

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.loss import effective_behavior, policy_loss, token_weights

JUNK = [math.nan, math.inf, -math.inf, 1e30]
MASK_TYPES = [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16]
COEFFICIENTS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "behavior_weight_cap": 1.5}
MAX_TOKENS = 8


def _mask(lengths, num_tokens=6, dtype=torch.bool):
    return (torch.arange(num_tokens) < torch.tensor(lengths)[:, None]).to(dtype)


def _average_by_hand(rows, aggregation):
    """Of lists of per-token losses, a list a response."""
    rows = [row for row in rows if row]
    if aggregation == "token":
        return statistics.fmean(itertools.chain(*rows))
    if aggregation == "sequence":
        return statistics.fmean(statistics.fmean(row) for row in rows)
    return statistics.fmean(sum(row) / MAX_TOKENS for row in rows)


lengths_lists = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)
aggregations = st.sampled_from(["token", "sequence", "constant"])


def test_token_weights_literal_numbers():
    # N = 4 tokens, R = 2 responses, of 1 and 3 tokens; the empty row is no response.
    mask = _mask([1, 0, 3], 3)
    assert token_weights(mask, aggregation="token").tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    sequence = token_weights(mask, aggregation="sequence")
    assert sequence.flatten().tolist() == pytest.approx([2, 0, 0, 0, 0, 0, 2 / 3, 2 / 3, 2 / 3])
    constant = token_weights(mask, aggregation="constant", max_tokens=16)
    assert constant.tolist() == [[0.125, 0, 0], [0, 0, 0], [0.125, 0.125, 0.125]]


@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_lists,
    aggregation=aggregations,
    mask_type=st.sampled_from(MASK_TYPES),
    seed=st.integers(0, 100),
)
def test_the_weighted_sum_over_tokens_is_the_papers_average(lengths, aggregation, mask_type, seed):
    mask = _mask(lengths, dtype=mask_type)
    losses = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    weights = token_weights(mask, aggregation=aggregation, max_tokens=MAX_TOKENS)
    assert weights.dtype == torch.float32
    assert (weights[mask == 0] == 0).all()
    rows = [losses[b, :length].tolist() for b, length in enumerate(lengths)]
    average = (weights * losses).sum().item() / sum(lengths)
    assert average == pytest.approx(_average_by_hand(rows, aggregation), rel=1e-4, abs=1e-5)


def _tokens(mask, seed):
    """Log-probs at ratio 1 and weight 1, so that the policy loss of a token is minus its advantage."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, advantages = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    return [logprobs.requires_grad_(), logprobs.detach(), logprobs.detach(), advantages]


def _policy(inputs, mask, **keywords: Any):
    policy, proximal, behavior, advantages = inputs
    return policy_loss(policy, proximal, behavior, advantages, mask, **COEFFICIENTS, **keywords)


@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_lists,
    aggregation=aggregations,
    cuts=st.sets(st.integers(1, 30), max_size=4),
    seed=st.integers(0, 100),
)
def test_the_average_does_not_depend_on_the_cut_into_rows_or_flat_chunks(lengths, aggregation, cuts, seed):
    mask = _mask(lengths)
    num_tokens = sum(lengths)
    inputs = _tokens(mask, seed)
    weights = token_weights(mask, aggregation=aggregation, max_tokens=MAX_TOKENS)

    def loss_of(part, part_mask, part_weights):
        return _policy(part, part_mask, num_tokens=num_tokens, token_weights_BT=part_weights)[0]

    rows = [(-inputs[3][b, :length]).tolist() for b, length in enumerate(lengths)]
    exact = _average_by_hand(rows, aggregation)
    by_row = sum(
        loss_of([x[b : b + 1] for x in inputs], mask[b : b + 1], weights[b : b + 1]) for b in range(len(lengths))
    )
    flat, flat_weights = [x[mask][None] for x in inputs], weights[mask][None]
    edges = [0, *sorted(cut for cut in cuts if cut < num_tokens), num_tokens]
    by_chunk = sum(
        loss_of([x[:, i:j] for x in flat], torch.ones(1, j - i), flat_weights[:, i:j])
        for i, j in itertools.pairwise(edges)
    )
    for loss in (by_row, by_chunk):
        assert loss.item() == pytest.approx(exact, rel=1e-5, abs=1e-6)
        (grad,) = torch.autograd.grad(loss, inputs[0], retain_graph=True)
        # d/d log p of -A log p, weighed
        torch.testing.assert_close(grad, -inputs[3] * weights.double() / num_tokens, rtol=1e-6, atol=1e-9)


def test_weights_of_each_micro_batch_by_itself_are_another_average():
    """The field's mistake: it is why the weights want the whole minibatch's mask."""
    whole = token_weights(_mask([1, 5, 2]), aggregation="sequence")
    cut = torch.cat([token_weights(_mask(lengths), aggregation="sequence") for lengths in ([1, 5], [2])])
    assert (whole - cut).abs().max() > 0.2


@pytest.mark.parametrize("junk", JUNK)
def test_no_weights_are_weights_of_1_to_the_bit_and_padding_never_counts(junk):
    mask = _mask([6, 2, 0, 3])
    inputs = _tokens(mask, 1)
    ones = token_weights(mask, aggregation="token").masked_fill(~mask, junk).requires_grad_()
    plain, plain_stats = _policy(inputs, mask, num_tokens=11)
    loss, stats = _policy(inputs, mask, num_tokens=11, token_weights_BT=ones)
    assert torch.equal(loss, plain)
    assert all(torch.equal(stats[key], plain_stats[key]) for key in plain_stats)
    loss.backward()
    assert inputs[0].grad.isfinite().all()
    assert ones.grad is None


def test_a_mask_of_zeros_has_weights_of_zero():
    for aggregation in ("token", "sequence", "constant"):
        assert token_weights(torch.zeros(2, 3), aggregation=aggregation, max_tokens=4).tolist() == [[0.0] * 3] * 2


def test_token_weights_refuse_bad_input():
    mask = torch.ones(2, 3)
    with pytest.raises(ValueError, match="aggregation is 'mean', allowed are token, sequence, constant"):
        token_weights(mask, aggregation="mean")
    for max_tokens in (None, 0):
        with pytest.raises(ValueError, match=f"max_tokens is {max_tokens}"):
            token_weights(mask, aggregation="constant", max_tokens=max_tokens)
    with pytest.raises(ValueError, match=r"mask_BT has shape \(3,\)"):
        token_weights(mask[0], aggregation="token")


# Weights of whole responses


@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_lists,
    seed=st.integers(0, 1000),
    junk=st.sampled_from(JUNK),
    mask_type=st.sampled_from(MASK_TYPES),
)
def test_a_sequence_weight_is_the_truncated_product_of_the_responses_ratios(lengths, seed, junk, mask_type):
    mask = _mask(lengths)
    generator = torch.Generator().manual_seed(seed)
    proximal, behavior, advantages = torch.randn(3, *mask.shape, generator=generator)
    proximal, behavior = 0.3 * proximal - 2, 0.3 * behavior - 2
    effective = effective_behavior(
        proximal.masked_fill(~mask, junk), behavior.masked_fill(~mask, junk), mask.to(mask_type), level="sequence"
    )
    assert effective.dtype == torch.float32
    assert (effective[~mask] == 0).all()
    loss, stats = policy_loss(proximal, proximal, effective, advantages, mask, **COEFFICIENTS, num_tokens=7)
    total = weight_sum = 0.0
    for b, length in enumerate(lengths):
        gaps = [p - q for p, q in zip(proximal[b, :length].tolist(), behavior[b, :length].tolist(), strict=True)]
        weight = min(math.prod(map(math.exp, gaps)), 1.5)
        total += weight * sum(advantages[b, :length].tolist())
        weight_sum += weight * length
    assert loss.item() == pytest.approx(-total / 7, rel=1e-4, abs=1e-5)
    assert stats["behavior_weight_sum"].item() == pytest.approx(weight_sum, rel=1e-4)


@pytest.mark.parametrize("junk", JUNK)
def test_token_level_leaves_log_probs_as_they_are(junk):
    behavior = torch.tensor([[-1.5, -0.25, junk]])
    effective = effective_behavior(torch.randn(1, 3), behavior, torch.tensor([[1, 1, 0]]), level="token")
    assert effective.tolist() == [[-1.5, -0.25, 0.0]]


def test_on_policy_the_sequence_weight_is_exactly_1():
    proximal = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 10
    effective = effective_behavior(proximal, proximal, torch.ones(3, 200), level="sequence")
    assert torch.equal(effective, proximal)
    assert not effective.requires_grad


def test_a_long_response_is_summed_without_loss():
    """10,000 tokens: float32 sums would be off by more than the tolerance."""
    generator = torch.Generator().manual_seed(0)
    proximal = -100 * torch.rand(1, 10_000, generator=generator)
    behavior = proximal.flip(1) - 1e-3 * torch.rand(1, 10_000, generator=generator)  # terms of ±100, a sum of 5
    effective = effective_behavior(proximal, behavior, torch.ones(1, 10_000), level="sequence")
    exact = math.fsum(p - q for p, q in zip(proximal[0].tolist(), behavior[0].tolist(), strict=True))
    assert abs(exact) > 1
    assert (proximal - effective)[0].tolist() == pytest.approx([exact] * 10_000, abs=2e-5)


@pytest.mark.parametrize(
    ("proximal", "behavior", "weight"),
    [
        ([-1.0, -1.0], [-401.0, -401.0], 1.5),  # exp(800) overflows float64
        ([-401.0, -401.0], [-1.0, -1.0], 0.0),
        ([-3e38, -3e38], [-1.0, -1.0], 0.0),  # the sum overflows float32
        ([-1.0, -math.inf], [-2.0, -2.0], 0.0),
        ([-1.0, -1.0], [-2.0, -math.inf], 1.5),
    ],
)
def test_extreme_responses_have_finite_weights_and_leave_others_alone(proximal, behavior, weight):
    proximal_BT = torch.tensor([proximal, [-1.0, -1.0]])
    behavior_BT = torch.tensor([behavior, [-1.1, -0.8]])
    mask = torch.ones(2, 2)
    effective = effective_behavior(proximal_BT, behavior_BT, mask, level="sequence")
    policy = torch.full((2, 2), -1.0, requires_grad=True)
    loss, stats = policy_loss(policy, proximal_BT, effective, mask, mask, **COEFFICIENTS, num_tokens=1)
    assert effective.isfinite().all()
    assert loss.isfinite()
    assert stats["behavior_weight_sum"].item() == pytest.approx(2 * weight + 2 * math.exp(-0.1), rel=1e-4)


def test_nan_in_a_sampled_token_is_not_hidden_and_stays_in_its_response():
    behavior = torch.tensor([[-1.0, math.nan], [-1.0, -1.0]])
    effective = effective_behavior(torch.full((2, 2), -1.0), behavior, torch.ones(2, 2), level="sequence")
    assert effective[0].isnan().all()
    assert effective[1].tolist() == [-1.0, -1.0]


def test_effective_behavior_refuses_bad_input():
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="level is 'row', allowed are token, sequence"):
        effective_behavior(zeros, zeros, zeros, level="row")
    with pytest.raises(ValueError, match="behavior_logprobs_BT"):
        effective_behavior(zeros, zeros[:1], zeros, level="token")
