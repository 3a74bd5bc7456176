"""The wire form of weights keeps every bit, and the digest sees every one."""

import numpy as np
import pytest
import torch

from models.weights import digest, from_wire, to_wire

# -0.0, the smallest subnormals, infinities, quiet and signalling NaN with payloads, as bits of bfloat16.
ODD_BITS = [0x8000, 0x0000, 0x0001, 0x8001, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0xFFFF, 0x3F80]


def bf16(bits, shape=None):
    tensor = torch.from_numpy(np.array(bits, dtype=np.uint16)).view(torch.bfloat16)
    return tensor if shape is None else tensor.reshape(shape)


def bits_of(tensor):
    return tensor.contiguous().view(torch.uint16).numpy()


def test_every_bfloat16_there_is_comes_back_bit_for_bit():
    everything = bf16(np.arange(1 << 16), (256, 256))
    [back] = from_wire(to_wire({"w": everything})).values()
    assert back.dtype == torch.bfloat16
    np.testing.assert_array_equal(bits_of(back), np.arange(1 << 16).reshape(256, 256))


def test_names_shapes_and_odd_values_come_back():
    tensors = {"b": bf16(ODD_BITS), "a": bf16(ODD_BITS[:6], (2, 3)), "scalar": bf16([0x8000], ())}
    wire = to_wire(tensors)
    assert {name: array.dtype for name, array in wire.items()} == dict.fromkeys(tensors, np.dtype(np.uint16))
    back = from_wire(wire)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        np.testing.assert_array_equal(bits_of(back[name]), bits_of(tensor))


def test_fp32_masters_are_rounded_to_the_nearest_even_bfloat16():
    # bfloat16 keeps 8 significant bits: near 1 the step is 2**-7, ties go to the even neighbour.
    step = 2.0**-7
    masters = torch.tensor([1 + 0.5 * step, 1 + 1.5 * step, 1 + 0.51 * step, -0.0], dtype=torch.float32)
    [back] = from_wire(to_wire({"w": masters})).values()
    assert back.float().tolist() == [1.0, 1 + 2 * step, 1 + step, 0.0]
    assert torch.signbit(back[3])


def test_a_transposed_view_travels_in_its_own_order():
    matrix = bf16(range(6), (2, 3))
    [back] = from_wire(to_wire({"w": matrix.T})).values()
    np.testing.assert_array_equal(bits_of(back), np.arange(6).reshape(2, 3).T)


def test_the_digest_does_not_depend_on_the_order_of_names():
    a, b = bf16([1, 2]), bf16([3])
    assert digest(to_wire({"a": a, "b": b})) == digest(to_wire({"b": b, "a": a}))


def test_any_bit_changes_the_digest():
    bits = np.array(ODD_BITS, dtype=np.uint16)
    seen = {digest({"w": bits})}
    for index in range(len(bits)):
        for bit in range(16):
            flipped = bits.copy()
            flipped[index] ^= 1 << bit
            seen.add(digest({"w": flipped}))
    assert len(seen) == 1 + 16 * len(bits)


def test_minus_zero_and_nan_payloads_are_differences():
    assert digest(to_wire({"w": bf16([0x0000])})) != digest(to_wire({"w": bf16([0x8000])}))
    assert digest(to_wire({"w": bf16([0x7FC0])})) != digest(to_wire({"w": bf16([0x7FC1])}))
    assert digest(to_wire({"w": bf16([0x7FC1])})) == digest(to_wire({"w": bf16([0x7FC1])}))


@pytest.mark.parametrize(
    "other",
    [
        {"v": bf16(range(6), (2, 3))},
        {"w": bf16(range(6), (3, 2))},
        {"w": bf16(range(6))},
        {"w": bf16(range(6), (1, 2, 3))},
        {"w": bf16(range(6), (2, 3)), "x": bf16([], (0,))},
        {"w": bf16(range(4), (2, 2)), "x": bf16([4, 5], (2,))},
        {},
    ],
)
def test_names_and_shapes_change_the_digest(other):
    assert digest(to_wire(other)) != digest(to_wire({"w": bf16(range(6), (2, 3))}))


def test_a_scalar_is_not_a_vector_of_one():
    assert digest(to_wire({"w": bf16([1], ())})) != digest(to_wire({"w": bf16([1], (1,))}))


def test_the_digest_is_of_values_not_of_memory_layout():
    matrix = np.arange(6, dtype=np.uint16).reshape(2, 3)
    assert digest({"w": matrix}) == digest({"w": np.asfortranarray(matrix)})
