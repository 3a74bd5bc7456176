"""Token log-probabilities and entropy against the softmax written out in double precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import logprobs as module
from models.logprobs import entropy, token_logprobs


def _softmax(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    weights = [math.exp((x - top) / temperature) for x in row]
    return [w / sum(weights) for w in weights]


def _example(num_rows=3, num_tokens=5, vocabulary=7, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(num_rows, num_tokens, vocabulary, generator=generator, dtype=torch.float64)
    tokens = torch.randint(vocabulary, (num_rows, num_tokens), generator=generator)
    return logits.to(dtype), tokens


def test_literal_numbers():
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    assert token_logprobs(logits, torch.tensor([[1]]), temperature=1.0).item() == pytest.approx(math.log(3 / 4))
    # Temperature 0.5 squares the odds: 9 to 1.
    assert token_logprobs(logits, torch.tensor([[0]]), temperature=0.5).item() == pytest.approx(math.log(1 / 10))
    assert entropy(torch.zeros(1, 1, 8), temperature=3.0).item() == pytest.approx(math.log(8))


@settings(max_examples=20, deadline=None)
@given(temperature=st.floats(0.1, 5.0), seed=st.integers(0, 1000), chunk=st.integers(1, 60))
def test_equals_softmax_by_hand_whatever_the_chunk(temperature, seed, chunk):
    logits, tokens = _example(seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", chunk)
        fast = token_logprobs(logits, tokens, temperature=temperature)
        fast_entropy = entropy(logits, temperature=temperature)
    for b in range(3):
        for t in range(5):
            probs = _softmax(logits[b, t].tolist(), temperature)
            slow = math.log(probs[tokens[b, t]])
            assert fast[b, t].item() == pytest.approx(slow, rel=1e-5, abs=1e-5)
            slow_entropy = -sum(p * math.log(p) for p in probs if p > 0)
            assert fast_entropy[b, t].item() == pytest.approx(slow_entropy, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("chunk", [1, 21, 1 << 23])
def test_gradcheck(temperature, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    logits, tokens = _example(dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, temperature=temperature), logits)
    assert torch.autograd.gradcheck(lambda x: entropy(x, temperature=temperature), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_float32_and_gradient_has_the_type_of_the_logits(dtype):
    logits, tokens = _example(dtype=dtype)
    logits.requires_grad_()
    fast = token_logprobs(logits, tokens, temperature=0.9)
    assert fast.dtype == entropy(logits, temperature=0.9).dtype == torch.float32
    # Only the logits are rounded: the arithmetic after them is float32.
    slow = (logits.detach().double() / 0.9).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    fast.sum().backward()
    assert logits.grad.dtype == dtype


def test_a_sliced_view_of_the_logits_gives_the_same_values_and_gradients(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 40)
    logits, tokens = _example(num_tokens=6)
    view, copy = logits.clone().requires_grad_(), logits[:, 1:-1].clone().requires_grad_()
    from_view = token_logprobs(view[:, 1:-1], tokens[:, 1:-1], temperature=1.3)
    from_copy = token_logprobs(copy, tokens[:, 1:-1], temperature=1.3)
    (from_view.square().sum() + from_copy.square().sum()).backward()
    assert torch.equal(from_view, from_copy)
    assert torch.equal(view.grad[:, 1:-1], copy.grad)
    assert view.grad[:, 0].abs().sum() == view.grad[:, -1].abs().sum() == 0


def test_nothing_of_vocabulary_size_is_saved_beside_the_logits():
    logits, tokens = _example(dtype=torch.bfloat16)
    logits.requires_grad_()
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        token_logprobs(logits, tokens, temperature=0.5)
    wide = [x for x in saved if x.numel() >= logits.numel()]
    assert [x.data_ptr() for x in wide] == [logits.data_ptr()]


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_junk_in_masked_positions_gives_no_gradient(junk):
    logits, tokens = _example()
    logits[1, 3:] = junk
    logits.requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    torch.where(mask, token_logprobs(logits, tokens, temperature=1.0), 0).sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1, 3:] == 0).all()
    assert (logits.grad[mask].abs().sum(-1) > 0).all()


def test_forbidden_and_huge_logits():
    logits = torch.tensor([[[1e4, 1e4 - 1.0, -math.inf]]], requires_grad=True)
    token = torch.tensor([[1]])
    logprob = token_logprobs(logits, token, temperature=1.0)
    bits = entropy(logits, temperature=1.0)
    p = 1 / (1 + math.e)
    assert logprob.item() == pytest.approx(math.log(p), abs=1e-3)  # float32 at 1e4
    assert bits.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-4)
    (grad,) = torch.autograd.grad((logprob + bits).sum(), logits)
    assert grad.isfinite().all()
    assert grad[0, 0, 2] == 0


def test_no_tokens():
    assert token_logprobs(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.long), temperature=1.0).shape == (2, 0)
    assert entropy(torch.zeros(2, 0, 5), temperature=1.0).shape == (2, 0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature(temperature):
    logits, tokens = _example()
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(logits, tokens, temperature=temperature)
    with pytest.raises(ValueError, match="temperature"):
        entropy(logits, temperature=temperature)


def test_bad_shapes_and_types():
    logits, tokens = _example()
    with pytest.raises(ValueError, match="tokens_BT"):
        token_logprobs(logits, tokens[:, :-1], temperature=1.0)
    with pytest.raises(ValueError, match="tokens_BT"):
        token_logprobs(logits, tokens.float(), temperature=1.0)
    with pytest.raises(ValueError, match="logits_BTV"):
        token_logprobs(logits[0], tokens[0], temperature=1.0)
    with pytest.raises(ValueError, match="logits_BTV"):
        entropy(logits.long(), temperature=1.0)
