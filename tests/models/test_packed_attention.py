"""Attention within segments against a slow softmax that looks at one query row at a time.

N rows, Q query and S key rows of a block, A heads, K key heads, M keys of all segments, D head size.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from models import packed_attention as module_under_test
from models.packed_attention import Segment, Segments, packed_attention

# A prompt of 3 with responses of 2, 1 and 4; a sequence of 5 by itself; one of 1; a prompt of 1 with two responses.
PARTS = (
    Segment(0, 3, 0, 0),
    Segment(3, 5, 0, 3),
    Segment(5, 6, 0, 3),
    Segment(6, 10, 0, 3),
    Segment(10, 15, 10, 10),
    Segment(15, 16, 15, 15),
    Segment(16, 17, 16, 16),
    Segment(17, 20, 16, 17),
    Segment(20, 21, 16, 17),
)
NUM_ROWS = 21
# Most products of a tree and of a segment that are computed densely.
DENSE = {"flash": (0, 0), "segments": (0, 10_000), "mixed": (25, 12), "trees": (10_000, 10_000)}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DENSE)
def dense(request, monkeypatch):
    tree, segment = DENSE[request.param]
    monkeypatch.setattr(module_under_test, "_DENSE_TREE", tree)
    monkeypatch.setattr(module_under_test, "_DENSE_SEGMENT", segment)
    return request.param


def random_inputs(*, heads=4, key_heads=2, size=8, rows=NUM_ROWS, dtype=torch.float64) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, number, rows, size) for number in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def visible(row: int, parts) -> list[int]:
    """The rows that a row attends to: its segment's prefix, and its segment up to itself."""
    [segment] = [part for part in parts if part.start <= row < part.end]
    return [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, row + 1)]


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, parts, scale: float) -> Tensor:
    """[1, N, A, D], a row of a head at a time."""
    num_heads, group = query.shape[1], query.shape[1] // key.shape[1]
    rows = []
    for row in range(query.shape[2]):
        seen = visible(row, parts)
        for head in range(num_heads):
            keys, values = key[0, head // group, seen], value[0, head // group, seen]
            weights = torch.softmax(keys @ query[0, head, row] * scale, dim=0)
            rows.append(weights @ values)
    return torch.stack(rows).view(1, query.shape[2], num_heads, query.shape[3])


def compare(function, expected_function, inputs, *, tolerance):
    generator = torch.Generator().manual_seed(1)
    found, expected = function(*inputs), expected_function(*inputs)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    pairs = [torch.autograd.grad((output * weights).sum(), inputs) for output in (found, expected)]
    for gradient, by_hand in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, by_hand, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (4, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_outputs_and_gradients_are_those_of_attention_by_hand(dense, heads, key_heads, scaling):
    inputs = random_inputs(heads=heads, key_heads=key_heads)
    scale = 1 / math.sqrt(8) if scaling is None else scaling
    compare(
        lambda q, k, v: packed_attention(nn.Module(), q, k, v, None, scaling=scaling, segments=Segments(PARTS))[0],
        lambda q, k, v: attention_by_hand(q, k, v, PARTS, scale),
        inputs,
        tolerance=1e-10,
    )


def test_without_segments_the_row_is_one_causal_sequence(dense):
    compare(
        lambda q, k, v: packed_attention(nn.Module(), q, k, v, None)[0],
        lambda q, k, v: attention_by_hand(q, k, v, (Segment(0, NUM_ROWS, 0, 0),), 1 / math.sqrt(8)),
        random_inputs(),
        tolerance=1e-10,
    )


# bf16 keeps 8 bits: an output near 1 is within 1/256 of the exact one, and the probabilities are rounded too.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_scores_and_softmax_are_wide_in_short_types(dense, dtype, tolerance):
    inputs = random_inputs(dtype=dtype)
    output, _ = packed_attention(nn.Module(), inputs[0], inputs[1], inputs[2], None, segments=Segments(PARTS))
    assert output.dtype == dtype
    query, key, value = (each.detach().double() for each in inputs)
    expected = attention_by_hand(query, key, value, PARTS, 1 / math.sqrt(8))
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


def test_no_gradient_reaches_what_a_row_does_not_see(dense):
    for row in range(NUM_ROWS):
        query, key, value = random_inputs()
        output, _ = packed_attention(nn.Module(), query, key, value, None, segments=Segments(PARTS))
        output[0, row].sum().backward()
        for tensor, rows in ((query, [row]), (key, visible(row, PARTS)), (value, visible(row, PARTS))):
            reached = set((tensor.grad.abs().amax(dim=(0, 1, 3)) != 0).nonzero().flatten().tolist())
            # A row that sees only itself has one probability, 1, whatever its query and key.
            assert reached == set(rows) or (reached <= set(rows) and rows == [row] and tensor is not value)


def test_a_tree_is_one_block_where_it_is_short_else_one_a_segment(monkeypatch):
    monkeypatch.setattr(module_under_test, "_DENSE_TREE", 25)
    blocks = Segments(PARTS).blocks
    assert [(block.rows, block.prefix) for block in blocks] == [
        (3, None), (2, 0), (1, 0), (4, 0), (5, None), (1, None), (5, None),
    ]  # fmt: skip
    start = 0
    for block in blocks:
        rows = range(start, start + block.rows)
        keys = [*(range(3) if block.prefix is not None else ()), *rows]
        assert block.bias_QS is not None
        for row, bias in zip(rows, block.bias_QS.tolist(), strict=True):
            seen = visible(row, PARTS)
            assert bias == [0.0 if key in seen else -math.inf for key in keys]
        start = rows.stop


@pytest.mark.parametrize(("kind", "calls"), [("flash", 9), ("segments", 0), ("mixed", 1), ("trees", 0)])
def test_only_long_blocks_take_the_flash_kernel(monkeypatch, kind, calls):
    tree, segment = DENSE[kind]
    monkeypatch.setattr(module_under_test, "_DENSE_TREE", tree)
    monkeypatch.setattr(module_under_test, "_DENSE_SEGMENT", segment)
    called = []
    kernel = module_under_test.scaled_dot_product_attention

    def counted(*args, **kwargs):
        called.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(module_under_test, "scaled_dot_product_attention", counted)
    query, key, value = random_inputs()
    packed_attention(nn.Module(), query, key, value, None, segments=Segments(PARTS))
    assert len(called) == calls


def varlen_by_hand(query_NAD, key_MKD, value_MKD, starts_q, starts_k, longest_q, longest_k, *, scale, window_size, **_):
    """What torch documents: query i of n sees keys up to i + m - n of its m (window (-1, 0) is causal so aligned)."""
    assert window_size == (-1, 0)
    rows, group = [], query_NAD.shape[1] // key_MKD.shape[1]
    lengths = []
    for q0, q1, k0, k1 in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True):
        lengths.append((int(q1 - q0), int(k1 - k0)))
        for row in range(int(q0), int(q1)):
            last = int(k1) - (int(q1) - 1 - row)
            for head in range(query_NAD.shape[1]):
                keys, values = key_MKD[k0:last, head // group], value_MKD[k0:last, head // group]
                rows.append(torch.softmax(keys @ query_NAD[row, head] * scale, dim=0) @ values)
    assert tuple(map(max, zip(*lengths, strict=True))) == (longest_q, longest_k)
    return torch.stack(rows).view_as(query_NAD)


def test_what_a_variable_length_kernel_is_asked_is_the_same_attention(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_hand)
    compare(
        lambda q, k, v: module_under_test._varlen(q, k, v, 0.3, Segments(PARTS)),
        lambda q, k, v: attention_by_hand(q, k, v, PARTS, 0.3),
        random_inputs(),
        tolerance=1e-10,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel runs on CUDA only")
def test_the_variable_length_kernel_gives_the_same_on_gpu():
    inputs: Any = [each.detach().cuda().requires_grad_() for each in random_inputs(size=64, dtype=torch.bfloat16)]
    exact: Any = [each.detach().double().cpu().requires_grad_() for each in inputs]
    output, _ = packed_attention(nn.Module(), inputs[0], inputs[1], inputs[2], None, segments=Segments(PARTS))
    expected = attention_by_hand(exact[0], exact[1], exact[2], PARTS, 1 / 8)
    torch.testing.assert_close(output.double().cpu(), expected, atol=3e-2, rtol=3e-2)
    output.sum().backward()
    expected.sum().backward()
    for tensor, by_hand in zip(inputs, exact, strict=True):
        assert tensor.grad is not None
        assert by_hand.grad is not None
        torch.testing.assert_close(tensor.grad.double().cpu(), by_hand.grad, atol=6e-2, rtol=6e-2)


def test_a_batch_of_rows_or_a_mask_is_refused():
    query, key, value = random_inputs()
    with pytest.raises(ValueError, match="one row of segments and no mask"):
        packed_attention(nn.Module(), query.repeat(2, 1, 1, 1), key, value, None)
    with pytest.raises(ValueError, match="one row of segments and no mask"):
        packed_attention(nn.Module(), query, key, value, torch.zeros(1, 1, NUM_ROWS, NUM_ROWS))
