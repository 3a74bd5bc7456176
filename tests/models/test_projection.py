"""The chunked projection against plain log_softmax and autograd, in float64.

N predicted tokens, n tokens of a chunk, H hidden, V vocabulary.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import projection
from models.projection import score_tokens, token_loss

N, H, V = 50, 5, 97
CHUNK_TOKENS = [1, 7, 1000]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=CHUNK_TOKENS)
def chunk_tokens(request, monkeypatch):
    monkeypatch.setattr(projection, "CHUNK_ELEMENTS", request.param * V)
    return request.param


def random_inputs(*, bias=True, forbidden=(), dtype=torch.float64) -> Any:
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(V, H, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64)
    bias_V[list(forbidden)] = -math.inf
    allowed = torch.tensor([token for token in range(V) if token not in forbidden])
    tokens_N = allowed[torch.randint(len(allowed), (N,), generator=generator)]
    weights_2N = torch.randn(2, N, generator=generator, dtype=torch.float64)
    leaves = [each.to(dtype).requires_grad_() for each in (hidden_NH, weight_VH, bias_V)]
    return (*leaves[:2], leaves[2] if bias else None), tokens_N, weights_2N


def nonlinear(weights_2N):
    """A sum over tokens that needs both inputs; stats by sum and by maximum."""

    def loss(logprobs_n: Tensor, entropy_n: Tensor, part: slice):
        a_n, b_n = weights_2N[:, part]
        value = (a_n * logprobs_n.exp() + a_n * logprobs_n.square() + b_n * entropy_n.square()).sum()
        stats = {"tokens": torch.tensor(len(logprobs_n)), "logprob_max": logprobs_n.detach().exp().max()}
        return value, stats | {"entropy_sum": entropy_n.detach().sum()}

    return loss


def plainly(leaves, tokens_N, *, temperature) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, all logits at once; a forbidden token adds nothing to an entropy."""
    hidden_NH, weight_VH, bias_V = leaves
    logits_NV = hidden_NH @ weight_VH.T + (0 if bias_V is None else bias_V)
    logprobs_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    possible_V = torch.ones(V, dtype=torch.bool) if bias_V is None else bias_V.isfinite()
    entropy_N = -(logprobs_NV.exp() * logprobs_NV)[:, possible_V].sum(-1)
    return logprobs_NV[torch.arange(N), tokens_N], entropy_N


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("entropy", ["loss", "metric", "off"])
def test_loss_and_gradients_are_those_of_plain_log_softmax(chunk_tokens, bias, temperature, entropy):
    leaves, tokens_N, weights_2N = random_inputs(bias=bias)
    total, stats = token_loss(
        leaves[0], leaves[1], leaves[2], tokens_N, nonlinear(weights_2N), temperature=temperature, entropy=entropy
    )

    logprobs_N, entropy_N = plainly(leaves, tokens_N, temperature=temperature)
    # A metric is a constant for the gradient; switched off it is 0.
    entropy_N = {"loss": entropy_N, "metric": entropy_N.detach(), "off": torch.zeros(N)}[entropy]
    expected, _ = nonlinear(weights_2N)(logprobs_N, entropy_N, slice(None))
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    used = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(3 * total, used)
    for gradient, by_hand in zip(gradients, torch.autograd.grad(3 * expected, used), strict=True):
        assert by_hand.abs().max() > 1e-3
        torch.testing.assert_close(gradient, by_hand, rtol=1e-10, atol=1e-12)
    assert stats["tokens"] == N
    torch.testing.assert_close(stats["logprob_max"], logprobs_N.exp().max().detach())
    torch.testing.assert_close(stats["entropy_sum"], entropy_N.detach().sum().to(torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_plain_log_softmax(chunk_tokens, temperature):
    leaves, tokens_N, _ = random_inputs()
    found = score_tokens(leaves[0], leaves[1], leaves[2], tokens_N, temperature=temperature)
    for scores_N, expected_N in zip(found, plainly(leaves, tokens_N, temperature=temperature), strict=True):
        assert not scores_N.requires_grad
        torch.testing.assert_close(scores_N, expected_N.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("entropy", ["loss", "metric", "off"])
def test_a_forbidden_token_adds_nothing_and_spoils_nothing(chunk_tokens, entropy):
    forbidden = (0, 50)
    leaves, tokens_N, weights_2N = random_inputs(forbidden=forbidden)
    total, stats = token_loss(
        leaves[0], leaves[1], leaves[2], tokens_N, nonlinear(weights_2N), temperature=0.7, entropy=entropy
    )
    gradients = torch.autograd.grad(total, leaves)
    scores = score_tokens(leaves[0], leaves[1], leaves[2], tokens_N, temperature=0.7)

    # The same without these rows of the weights.
    kept = torch.tensor([token for token in range(V) if token not in forbidden])
    hidden_NH, weight_VH, bias_V = leaves
    logits_NV = (hidden_NH @ weight_VH[kept].T + bias_V[kept]) / 0.7
    logprobs_NV = logits_NV.log_softmax(-1)
    logprobs_N = logprobs_NV[torch.arange(N), torch.searchsorted(kept, tokens_N)]
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    torch.testing.assert_close(scores, (logprobs_N.detach(), entropy_N.detach()))
    entropy_N = {"loss": entropy_N, "metric": entropy_N.detach(), "off": torch.zeros(N)}[entropy]
    expected, _ = nonlinear(weights_2N)(logprobs_N, entropy_N, slice(None))
    torch.testing.assert_close(total, expected)
    assert all(bool(number.isfinite()) for number in stats.values())
    for gradient, by_hand in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("entropy", ["loss", "off"])
def test_gradients_are_the_slopes_of_the_loss(monkeypatch, entropy):
    """Central differences, each element by itself."""
    monkeypatch.setattr(projection, "CHUNK_ELEMENTS", 2 * 7)
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7, 3), (7,)]
    leaves: Any = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    tokens_N = torch.tensor([0, 6, 3, 3, 1])
    loss = nonlinear(torch.randn(2, 5, generator=generator, dtype=torch.float64))

    def value() -> Tensor:
        return token_loss(leaves[0], leaves[1], leaves[2], tokens_N, loss, temperature=0.8, entropy=entropy)[0]

    for leaf, gradient in zip(leaves, torch.autograd.grad(value(), leaves), strict=True):
        flat = leaf.detach().flatten()  # a view: changes are seen
        for index, slope in enumerate(gradient.flatten().tolist()):
            here = flat[index].item()
            ends = []
            for end in (here + 1e-5, here - 1e-5):
                flat[index] = end
                ends.append(value().item())
            flat[index] = here
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_second_backward_pass_is_refused_and_not_wrong():
    """The gradients of the weights are scaled where they lie: one [V, H] in memory, not two."""
    leaves, tokens_N, weights_2N = random_inputs()
    total, _ = token_loss(leaves[0], leaves[1], leaves[2], tokens_N, nonlinear(weights_2N), temperature=1.0)
    (2 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * total).backward()


def test_only_what_needs_a_gradient_gets_one(chunk_tokens):
    (hidden_NH, weight_VH, bias_V), tokens_N, weights_2N = random_inputs()
    loss = nonlinear(weights_2N)
    total, _ = token_loss(hidden_NH, weight_VH.detach(), bias_V.detach(), tokens_N, loss, temperature=1.0)
    total.backward()
    expected, _ = token_loss(hidden_NH, weight_VH, bias_V, tokens_N, loss, temperature=1.0)
    torch.testing.assert_close(hidden_NH.grad, torch.autograd.grad(expected, hidden_NH)[0], rtol=0, atol=0)


def test_a_loss_that_does_not_look_at_the_tokens_has_gradient_zero(chunk_tokens):
    leaves, tokens_N, _ = random_inputs()
    total, _ = token_loss(
        leaves[0],
        leaves[1],
        leaves[2],
        tokens_N,
        lambda logprobs_n, _, part: (0 * logprobs_n.sum(), {}),
        temperature=1.0,
    )
    for gradient in torch.autograd.grad(total, leaves):
        assert gradient.abs().max() == 0


def test_bf16_gradients_of_many_chunks_are_summed_in_float32(monkeypatch):
    """A sum of bf16 numbers stops to grow where the next one is below half its last bit."""
    monkeypatch.setattr(projection, "CHUNK_ELEMENTS", V)  # a chunk a token
    hidden_NH = torch.ones(2000, H, dtype=torch.bfloat16)
    weight_VH = torch.zeros(V, H, dtype=torch.bfloat16, requires_grad=True)
    tokens_N = torch.zeros(2000, dtype=torch.long)
    total, _ = token_loss(
        hidden_NH, weight_VH, None, tokens_N, lambda logprobs_n, _, part: (logprobs_n.sum(), {}), temperature=1.0
    )
    total.backward()
    assert weight_VH.grad is not None
    assert weight_VH.grad.dtype == torch.bfloat16
    # d Σ logprob / d weight: 1 - 1 / V for the token, -1 / V for the others, 2000 times.
    expected = torch.full((V, H), -2000 / V).index_fill(0, torch.tensor(0), 2000 * (1 - 1 / V))
    torch.testing.assert_close(weight_VH.grad.float(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(total, torch.tensor(-2000 * math.log(V)), rtol=1e-4, atol=0)


class LargestOverVocabulary(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns with V in its shape, the weights' apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for output in result if isinstance(result, tuple | list) else [result]:
            if isinstance(output, Tensor) and V in output.shape and H not in output.shape:
                self.elements = max(self.elements, output.numel())
        return result


@pytest.mark.parametrize("entropy", ["loss", "metric", "off"])
@pytest.mark.parametrize("size", [1, 7])
def test_no_tensor_over_the_vocabulary_is_larger_than_a_chunk(monkeypatch, entropy, size):
    monkeypatch.setattr(projection, "CHUNK_ELEMENTS", size * V + V - 1)
    leaves, tokens_N, weights_2N = random_inputs()
    with LargestOverVocabulary() as largest:
        total, _ = token_loss(
            leaves[0], leaves[1], leaves[2], tokens_N, nonlinear(weights_2N), temperature=0.7, entropy=entropy
        )
        total.backward()
        score_tokens(leaves[0], leaves[1], leaves[2], tokens_N, temperature=0.7)
    assert largest.elements == size * V
    with LargestOverVocabulary() as largest:  # the mode sees what it should
        plainly(leaves, tokens_N, temperature=0.7)
    assert largest.elements == N * V
