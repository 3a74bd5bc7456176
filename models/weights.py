"""Weights on their way from the learner to those who sample: wire form and digest.

The wire form of a tensor is its bytes as a NumPy array that Ray's object store hands out without a copy. NumPy
has no bfloat16, so bfloat16 travels as uint16 of the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

WireTensors = Mapping[str, np.ndarray]


def to_wire(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """bfloat16 copies of the tensors as uint16 arrays of the same shape, on the CPU."""
    return {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
        for name, tensor in tensors.items()
    }


def from_wire(tensors: WireTensors) -> dict[str, Tensor]:
    """bfloat16 tensors over the same memory. The object store shares it between readers: never write to them."""
    return {name: torch.from_numpy(array).view(torch.bfloat16) for name, array in tensors.items()}


def digest(tensors: WireTensors) -> str:
    """SHA-256 over names, shapes and bits in order of the names: equal digests, equal weights."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        state.update(f"{name}{array.shape}{array.dtype}".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()
