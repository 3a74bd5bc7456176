"""All weights of an engine in memory that its owner writes and its workers read: its shadow.

On CPU vLLM packs weights for its matrix products and keeps nothing that a change could be written into, so the weights
are kept a second time, by their checkpoint names, and loaded from there. The memory is a file without a name: the name
goes as soon as every worker has mapped it, and the memory with the last process, however that ends.

Layout: 8 bytes with the header's length, the header (JSON: name to dtype, shape, offset), the tensors.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from models.engine_weights import ExpectedWeights, expected_weights

_ALIGNMENT = 64  # bytes: a cache line, and more than any dtype needs


class Shadow:
    """`tensors` are writable views by Hugging Face name; the owner of the engine holds them."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self.tensors = MappingProxyType(dict(tensors))

    @classmethod
    def create(cls, path: Path, expected: ExpectedWeights, model: str) -> Shadow:
        """Reserve the memory under `path` and fill it with the weights of `model`.

        Raises:
            RuntimeError: there is not enough memory for files at `path`.
            ValueError: `model` does not have the weights that it should.
        """
        try:
            _reserve(path, expected)
            shadow = cls(path, _mapped(path, "r+"))
            _fill(shadow.tensors, model, expected.dtype)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return shadow

    def remove_name(self) -> None:
        """Once every worker has mapped it: nothing lies there any more if all of them are killed."""
        self.path.unlink(missing_ok=True)


def mapped_for_reading(path: Path) -> dict[str, Tensor]:
    """The tensors of a shadow, in their order; who writes to one of them dies of it."""
    return _mapped(path, "r")


def _reserve(path: Path, expected: ExpectedWeights) -> None:
    layout, offset = {}, 0
    for name, shape in expected.shapes.items():
        layout[name] = (str(expected.dtype).removeprefix("torch."), shape, offset)
        offset += _aligned(math.prod(shape) * expected.dtype.itemsize)
    header = json.dumps(layout).encode()
    num_bytes = _aligned(8 + len(header)) + offset
    with path.open("wb") as file:
        try:
            # Where memory is short this fails, and a write to a file that only seems to be long enough kills.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise RuntimeError(
                f"{path.parent} has no room for {num_bytes / 2**20:.0f} MiB, the engine's weights ({error}); "
                "in a container: docker run --shm-size"
            ) from error
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)


def _mapped(path: Path, mode: Any) -> dict[str, Tensor]:
    data = np.memmap(path, np.uint8, mode)
    header_end = 8 + int.from_bytes(data[:8].tobytes(), "little")
    layout = json.loads(data[8:header_end].tobytes())
    start = _aligned(header_end)
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, (dtype_name, shape, offset) in layout.items():
            dtype = getattr(torch, dtype_name)
            begin = start + offset
            end = begin + math.prod(shape) * dtype.itemsize
            tensors[name] = torch.from_numpy(data[begin:end]).view(dtype).view(shape)
    return tensors


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def policy_tensors(model: str, dtype: str) -> dict[str, Tensor]:
    """What an engine of `dtype` holds of `model`, in ordinary memory."""
    expected = expected_weights(model, dtype)
    tensors = {name: torch.empty(shape, dtype=expected.dtype) for name, shape in expected.shapes.items()}
    _fill(tensors, model, expected.dtype)
    return tensors


def _fill(tensors: Mapping[str, Tensor], model: str, dtype: torch.dtype) -> None:
    missing = set(tensors)
    for name, tensor in _checkpoint_tensors(Path(model)):
        if name in missing and tensor.shape == tensors[name].shape:
            tensors[name].copy_(tensor)
            missing.remove(name)
    if not missing:
        return
    # A hub's id, other file formats, and older folders whose names transformers translates.
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).state_dict()
    for name, tensor in tensors.items():
        if name not in loaded or loaded[name].shape != tensor.shape:
            raise ValueError(f"model {model}: no weight {name} of shape {tuple(tensor.shape)}")
        tensor.copy_(loaded[name])


def _checkpoint_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """One after the other, so that no second copy of the model is held."""
    files = folder.glob("*.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = (folder / name for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for path in sorted(files):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 it is no dictionary
                yield name, file.get_tensor(name)
