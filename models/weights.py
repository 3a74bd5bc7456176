"""Weights as values: digest, difference of two states, application of a difference. Lossless, whatever the dtype.

`models.weight_stream` does the same for a stream of versions, in place and a layer at a time. NumPy has no bfloat16: as
an array it is uint16 of the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from contracts.records import WeightsUpdate
from models.weight_bits import bits_of, digest_of_bits, digest_of_state, spec_of
from models.weight_frames import frame_bytes, read_frame
from models.weight_stream import DeltaReceiver, DeltaSender, read_update

WireTensors = Mapping[str, np.ndarray]
Tensors = Mapping[str, "Tensor | np.ndarray"]


def to_wire(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """bfloat16 copies of the tensors as uint16 arrays of the same shape, on the CPU."""
    return {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
        for name, tensor in tensors.items()
    }


def from_wire(tensors: WireTensors) -> dict[str, Tensor]:
    """bfloat16 tensors over the same memory. The object store shares it between readers: never write to them."""
    return {name: torch.from_numpy(array).view(torch.bfloat16) for name, array in tensors.items()}


def digest(tensors: Tensors) -> str:
    """BLAKE3 over names, dtypes, shapes and bits in order of the names: equal digests, equal weights."""
    return digest_of_state((spec_of(name, each), digest_of_bits(bits_of(each))) for name, each in tensors.items())


def folder_digest(folder: Path) -> str:
    """`digest` of the tensors in a Hugging Face folder.

    Raises:
        ValueError: it holds no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: holds no *.safetensors")
    return digest_of_state(
        (spec_of(name, tensor), digest_of_bits(bits_of(tensor)))
        for file in files
        for name, tensor in load_file(file).items()
    )


@dataclass(frozen=True)
class WeightsDelta:
    """What leads from one state to another: the frames of `update`."""

    update: WeightsUpdate
    frames: tuple[bytes, ...]

    @property
    def base_version(self) -> int | None:
        return self.update.base_version

    @property
    def version(self) -> int:
        return self.update.version

    def to_bytes(self) -> bytes:
        return b"".join(self.frames)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> WeightsDelta:
        """Raises ValueError for anything but exactly what `to_bytes` gave."""
        rest = memoryview(data).cast("B")
        frames: list[bytes] = []
        while len(rest) or not frames:
            size = frame_bytes(rest)
            if size > len(rest) or size <= 0:
                raise ValueError(f"frame {len(frames) + 1} has {len(rest)} bytes of {size}")
            frames.append(bytes(rest[:size]))
            rest = rest[size:]
        return cls(_update(frames), tuple(frames))


def diff(base: Tensors, new: Tensors, *, base_version: int = 0, version: int = 1) -> WeightsDelta:
    """What leads from `base` to `new`, tensors of any dtype and shape.

    Raises:
        ValueError: names, dtypes or shapes differ, or `version` is not above `base_version`.
    """
    if base.keys() != new.keys():
        raise ValueError(f"{sorted(base.keys() ^ new.keys())[0]} is in one of the states only")
    sender = DeltaSender()
    sender.seed(base.items(), base_version)
    frames = tuple(bytes(frame) for frame in sender.encode(((name, new[name]) for name in base), version))
    return WeightsDelta(_update(frames), frames)


def apply(delta: WeightsDelta, tensors: Tensors) -> dict[str, Tensor | np.ndarray]:
    """The state that `delta` leads to, in new memory, each tensor of the kind and on the device of the old one.

    Raises:
        ValueError: `tensors` is not the state that `delta` starts from, or the delta is damaged.
    """
    copies = {name: _copy(each) for name, each in tensors.items()}
    DeltaReceiver(copies, delta.base_version).apply(delta.frames, update=delta.update, sender="diff")
    return {
        name: torch.as_tensor(copy, device=old.device) if isinstance(old, Tensor) else copy
        for (name, copy), old in zip(copies.items(), tensors.values(), strict=True)
    }


def _update(frames: Sequence[bytes]) -> WeightsUpdate:
    """The record that frames which came without one would have; ValueError where they are no whole update."""
    read = [read_frame(frame, None) for frame in frames]
    records = [record for frame in read for record in frame.records]
    header = read[0].header
    update = WeightsUpdate(
        version=header.version,
        base_version=header.base_version,
        num_bytes=sum(frame.num_bytes for frame in read),
        digest=digest_of_state((record.spec, record.digest) for record in records),
        dense_bytes=0,
        num_frames=len(read),
        fingerprint=header.fingerprint.hex(),
    )
    read_update(frames, update, None)
    return update


def _copy(tensor: Tensor | np.ndarray) -> Tensor | np.ndarray:
    if isinstance(tensor, Tensor):
        return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return np.array(tensor, dtype=tensor.dtype.newbyteorder("="), order="C")
