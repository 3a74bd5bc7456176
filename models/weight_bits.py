"""Tensors as the integers that their bits spell, and digests of them.

Floats compare by their bits, never as floats: -0 differs from +0, and a NaN is equal to itself and to no other NaN.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

DIGEST_BYTES = 16

Bits = np.ndarray  # one axis, unsigned integers, little-endian

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.uint64}
_BLOCK = 1 << 20  # values compared at a time: they and what is found stay in the processor's cache


class Spec(NamedTuple):
    """What a tensor is, but for its bits."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def spec_of(name: str, tensor: Tensor | np.ndarray) -> Spec:
    """NumPy's and torch's dtypes of the same name are the same: float32, int64, bool."""
    dtype = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else tensor.dtype.name
    return Spec(name, dtype, tuple(tensor.shape))


def bits_of(tensor: Tensor | np.ndarray) -> Bits:
    """The bits in row-major order: the same memory where the tensor is a contiguous one on the CPU, else a copy.

    Raises:
        ValueError: a tensor that is not a plain block of numbers (sparse, quantized, objects, text).
    """
    if isinstance(tensor, Tensor):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype} has no plain bits")
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        size = plain.element_size()
        if plain.numel() == 0:  # may have strides that torch does not view as bytes
            return np.empty(0, _UNSIGNED[size])
        flat = plain.reshape(-1).view(torch.uint8).numpy()
    else:
        if tensor.dtype.kind not in "biufc" or tensor.dtype.itemsize not in _UNSIGNED:
            raise ValueError(f"an array of dtype {tensor.dtype} has no plain bits")
        ordered = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("="))
        size, flat = ordered.itemsize, ordered.reshape(-1).view(np.uint8)
    return flat.view(_UNSIGNED[size])


def digest_of_bits(bits: Bits) -> bytes:
    """BLAKE3, cut to 16 bytes: five times the speed of SHA-256, and as hard to forge."""
    return blake3(bits.view(np.uint8).data).digest(DIGEST_BYTES)


def digest_of_state(tensors: Iterable[tuple[Spec, bytes]]) -> str:
    """Digest of specs and digests of tensors, in any order."""
    lines = sorted(json.dumps([*spec, digest.hex()]) for spec, digest in tensors)
    return blake3("\n".join(lines).encode()).hexdigest()


def fingerprint(specs: Iterable[Spec]) -> bytes:
    """Digest of names, dtypes and shapes, in any order: which model the weights are for."""
    return bytes.fromhex(digest_of_state((spec, b"") for spec in specs))[:DIGEST_BYTES]


def changed(old: Bits, new: Bits) -> np.ndarray:
    """Where the bits differ, ascending int64."""
    parts = [
        np.flatnonzero(old[start : start + _BLOCK] != new[start : start + _BLOCK]) + start
        for start in range(0, len(new), _BLOCK)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
