"""The wire forms of weights keep every bit, the digest sees every one, and nothing damaged or foreign is applied."""

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from models.weights import WeightsDelta, apply, diff, digest, from_wire, to_wire

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


def test_arrays_and_tensors_of_one_dtype_have_one_digest():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest({"w": values}) == digest({"w": torch.from_numpy(values)})
    assert digest({"w": values.astype(">f4")}) == digest({"w": values})


def random_bits(dtype, shape, seed):
    """A tensor of any bits that its dtype has, NaN payloads and subnormals among them."""
    source = np.random.default_rng(seed)
    size = dtype.itemsize * int(np.prod(shape))
    data = torch.from_numpy(source.integers(0, 2 if dtype == torch.bool else 256, size, dtype=np.uint8))
    return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def same_bits(found, expected):
    return (
        found.keys() == expected.keys()
        and all(found[name].dtype == expected[name].dtype for name in expected)
        and all(found[name].shape == expected[name].shape for name in expected)
        and all(torch.equal(raw(found[name]), raw(expected[name])) for name in expected)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7, 5), (2, 3, 4)])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_any_state_is_reached_bit_for_bit(dtype, shape, share):
    base = {"model.layers.0.w": random_bits(dtype, shape, 0), "b": random_bits(dtype, shape, 1)}
    new = {name: tensor.clone() for name, tensor in base.items()}
    for seed, tensor in enumerate(new.values()):
        where = np.flatnonzero(np.random.default_rng(seed).random(tensor.numel()) < share)
        for index in where:
            tensor.view(-1)[index] = random_bits(dtype, (len(where) + 1,), 9)[len(where)]
    kept = {name: tensor.clone() for name, tensor in base.items()}
    delta = WeightsDelta.from_bytes(diff(base, new, base_version=4, version=6).to_bytes())
    assert (delta.base_version, delta.version) == (4, 6)
    found: dict[str, Any] = apply(delta, base)
    assert same_bits(found, new)
    assert same_bits(base, kept)
    assert all(found[name].data_ptr() != base[name].data_ptr() for name in base if base[name].numel())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 0xFFFF), st.one_of(st.none(), st.integers(0, 0xFFFF))), max_size=300),
    st.sampled_from([torch.bfloat16, torch.float16, torch.int16]),
)
def test_any_values_become_any_values(pairs, dtype):
    base, new = (
        torch.from_numpy(np.array(values, dtype=np.uint16)).view(dtype)
        for values in ([old for old, _ in pairs], [old if fresh is None else fresh for old, fresh in pairs])
    )
    delta = WeightsDelta.from_bytes(diff({"w": base}, {"w": new}).to_bytes())
    assert same_bits(apply(delta, {"w": base}), {"w": new})


def test_views_that_are_not_contiguous_are_reached_too():
    base = {"w": torch.arange(24.0).reshape(4, 6).T, "v": torch.arange(10.0)[::3], "e": torch.ones(1).expand(5)}
    new = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in new.values():
        tensor.flatten()[0] = -0.0
        tensor[-1] = float("nan")
    assert same_bits(apply(diff(base, new), base), new)


def test_arrays_give_arrays():
    base = {"w": np.arange(12, dtype=np.uint16).reshape(3, 4), "s": np.array(3.5)}
    new = {"w": base["w"].copy(), "s": np.array(-0.0)}
    new["w"][1, 2] = 0x7FC1
    found: dict[str, Any] = apply(diff(base, new), base)
    for name, expected in new.items():
        assert isinstance(found[name], np.ndarray)
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert found[name].tobytes() == expected.tobytes()


def test_no_tensors_at_all_are_a_state():
    assert apply(WeightsDelta.from_bytes(diff({}, {}).to_bytes()), {}) == {}


def test_gaps_and_steps_of_every_width():
    """Gaps that need one byte, two and three; steps from 1 to the largest, and across the sign bit."""
    base = torch.zeros(1 << 18, dtype=torch.int32)
    new = base.clone()
    for index, value in zip(
        [0, 1, 255, 511, 70000, (1 << 18) - 1], [1, -1, 255, -70000, 2**31 - 1, -(2**31)], strict=True
    ):
        new[index] = value
    delta = diff({"w": base}, {"w": new})
    assert len(delta.to_bytes()) < 500
    assert same_bits(apply(delta, {"w": base}), {"w": new})


STATE = {
    "model.embed.weight": bf16(range(40), (8, 5)),
    "model.layers.0.weight": bf16(range(12), (3, 4)),
    "model.layers.1.weight": bf16(range(12), (4, 3)),
    "scale": torch.tensor(2.0),
}


def small_delta():
    new = {name: tensor.clone() for name, tensor in STATE.items()}
    new["model.embed.weight"][2] *= 3
    new["model.layers.1.weight"][:] = bf16([*ODD_BITS, 1], (4, 3))
    return diff(STATE, new), new


def test_every_flipped_bit_is_found():
    data = small_delta()[0].to_bytes()
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(ValueError):  # noqa: PT011  whatever the field, a reason of its own
                WeightsDelta.from_bytes(bytes(damaged))


def test_every_truncation_and_every_addition_is_found():
    delta, new = small_delta()
    data = delta.to_bytes()
    assert same_bits(apply(WeightsDelta.from_bytes(data), STATE), new)
    for length in range(len(data)):
        with pytest.raises(ValueError):  # noqa: PT011
            WeightsDelta.from_bytes(data[:length])
    for extra in (b"\0", b"HRWF", data[:100], data):
        with pytest.raises(ValueError):  # noqa: PT011
            WeightsDelta.from_bytes(data + extra)


def test_frames_out_of_order_missing_or_of_another_delta_are_found():
    frames = small_delta()[0].frames
    other = diff(STATE, STATE, base_version=1, version=2).frames
    assert len(frames) == 4
    for wrong in (frames[1:], frames[:-1], (frames[1], frames[0], *frames[2:]), (*frames, frames[0]), frames[:1] * 4,
                  (other[0], *frames[1:])):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011
            WeightsDelta.from_bytes(b"".join(wrong))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_forged_bytes_with_the_right_checksum_raise_value_errors_alone(data):
    """No other exception, and no allocation by a length that somebody wrote."""
    frames = [bytearray(frame) for frame in small_delta()[0].frames]
    frame = frames[data.draw(st.integers(0, 3))]
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 33))] = data.draw(st.integers(0, 255))
    frame[-32:] = blake3(frame[:-32]).digest()
    with contextlib.suppress(ValueError):
        apply(WeightsDelta.from_bytes(b"".join(frames)), STATE)


def forged(frame, old, new):
    """The frame with bytes replaced and the checksum made to fit."""
    assert bytes(frame).count(old) == 1
    body = bytes(frame[:-32]).replace(old, new)
    return body + blake3(body).digest()


def test_a_forged_count_is_refused_before_it_is_allocated():
    base = {"w": torch.zeros(1000, dtype=torch.int16)}
    new = {"w": torch.zeros(1000, dtype=torch.int16)}
    new["w"][:77] = 1
    [frame] = diff(base, new).frames
    for count in (1001, 2**40, 2**63, 2**64 - 1):
        data = forged(frame, struct.pack("<BQ", 1, 77), struct.pack("<BQ", 1, count))
        with pytest.raises(ValueError, match=r"changed values|a stream"):
            apply(WeightsDelta.from_bytes(data), base)


def test_a_state_that_the_delta_does_not_start_from_is_refused():
    delta, new = small_delta()
    for name in STATE:
        other = STATE | {name: STATE[name].clone()}
        raw_view = other[name].reshape(-1).view(torch.uint8)
        raw_view[0] ^= 1
        with pytest.raises(ValueError, match=f"{name}: the bits held are not those"):
            apply(delta, other)
    with pytest.raises(ValueError, match="the bits held are not those"):
        apply(delta, new)  # twice


@pytest.mark.parametrize(
    "other",
    [
        {name: tensor for name, tensor in STATE.items() if name != "scale"},
        STATE | {"more": torch.zeros(1)},
        STATE | {"scale": torch.tensor([2.0])},
        STATE | {"scale": torch.tensor(2.0).half()},
        STATE | {"model.layers.0.weight": STATE["model.layers.0.weight"].reshape(4, 3)},
        STATE | {"model.layers.0.weight": STATE["model.layers.0.weight"].view(torch.float16)},
        {},
    ],
)
def test_another_model_is_refused(other):
    delta, _ = small_delta()
    with pytest.raises(ValueError, match="refused: "):
        apply(delta, other)
    with pytest.raises(ValueError, match=r"in one of the states only|came where"):
        diff(STATE, other)


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), np.array(["text"]), np.array([object()]), np.zeros(2, dtype=[("a", np.int8)])],
    ids=["sparse", "text", "objects", "records"],
)
def test_what_has_no_plain_bits_is_refused(tensor):
    with pytest.raises(ValueError, match="has no plain bits"):
        digest({"w": tensor})
