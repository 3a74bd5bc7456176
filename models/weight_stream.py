"""Both ends of the way that weights take: the learner's `DeltaSender`, an engine's `DeltaReceiver`.

The sender keeps the last published state and sends what differs from it, a frame a layer. The receiver checks every
frame of an update before it changes a byte. Where it cannot take an update it says why, and whether a keyframe, which
is complete in itself, would help.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contracts.records import WeightsUpdate
from models.weight_bits import Bits, Spec, bits_of, digest_of_bits, digest_of_state, fingerprint, spec_of
from models.weight_frames import Buffer, Encoding, Frame, FrameWriter, Header, Record, read_frame

# Of a layer's tensors and of a frame; a tensor larger than that has a frame of its own.
_FRAME_BYTES = 64 << 20
_LAYER = re.compile(r".*?\.\d+\.")

_TORCH_DTYPES = {
    str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)
}

Named = Iterable[tuple[str, "Tensor | np.ndarray"]]


class DeltaError(ValueError):
    """An update that was refused, in one line: version, sender, reason.

    `needs_keyframe`: only a keyframe brings this receiver on. False where it has the version already.
    """

    def __init__(self, sender: str, version: int, reason: str, *, needs_keyframe: bool) -> None:
        super().__init__(f"weights version {version} from {sender} refused: {reason}")
        self.sender, self.version, self.reason, self.needs_keyframe = sender, version, reason, needs_keyframe


@dataclass
class _Held:
    """A tensor of the last whole state."""

    spec: Spec
    bits: Bits
    digest: bytes


class DeltaSender:
    """Turns each new state into frames against the last one, of which it keeps one copy.

    Args:
        key: signs the frames; the receivers need the same.
        dense: every update is a keyframe.
    """

    def __init__(self, *, key: bytes | None = None, dense: bool = False) -> None:
        self._key, self._dense = key, dense
        self._state: dict[str, _Held] = {}
        self.version: int | None = None  # of the whole state; None: there is none, and the next update is a keyframe

    @property
    def next_base(self) -> int | None:
        """The version that the next update will build on; None: it will be a keyframe."""
        return None if self._dense else self.version

    def seed(self, tensors: Named, version: int) -> None:
        """Take over a state that the receivers have already."""
        if version < 0:
            raise ValueError(f"version {version} is negative")
        self.version, held = None, self._state
        self._state = {}
        for name, tensor in tensors:
            if name in self._state:
                raise ValueError(f"{name} comes twice")
            spec, bits = spec_of(name, tensor), bits_of(tensor)
            reused = held.pop(name, None)
            if reused is not None and reused.spec == spec:
                np.copyto(reused.bits, bits)
            else:
                reused = _Held(spec, bits.copy(), b"")
            reused.digest = digest_of_bits(reused.bits)
            self._state[name] = reused
        self.version = version

    def encode(self, tensors: Named, version: int) -> Generator[memoryview, None, None]:
        """The frames that lead from the last state to `tensors`, each as soon as its layer is complete.

        Tensors come one by one, by the names and in the order of the last state, which moves on with them. Where this
        ends before the last frame was taken, no whole state is left and the next update is a keyframe.

        Raises:
            ValueError: a tensor of another name, dtype or shape than the last state's.
        """
        base_version = self.next_base
        if base_version is None:
            self.seed(tensors, version)
        elif version <= base_version:
            raise ValueError(f"version {version} does not follow version {base_version}")
        self.version = None
        if base_version is None:
            yield from self._keyframe(version)
        else:
            yield from self._delta(tensors, base_version, version)
        self.version = version

    def keyframe(self) -> Iterator[memoryview]:
        """The frames of the whole state, for receivers that hold another or none.

        Raises:
            RuntimeError: there is no whole state.
        """
        if self.version is None:
            raise RuntimeError("no whole version of the weights is held: nothing was published, or publishing failed")
        yield from self._keyframe(self.version)

    def _delta(self, tensors: Named, base_version: int, version: int) -> Iterator[memoryview]:
        source = iter(tensors)
        for header, group in self._plan(base_version, version):
            writer = FrameWriter()
            for held in group:
                _advance(held, next(source, None), writer)
            if header.index == header.total - 1 and (extra := next(source, None)) is not None:
                raise ValueError(f"{extra[0]} came behind the last tensor")
            yield writer.finish(header, self._key)

    def _keyframe(self, version: int) -> Iterator[memoryview]:
        for header, group in self._plan(None, version):
            writer = FrameWriter()
            for held in group:
                writer.add_dense(held.spec, held.bits, held.digest)
            yield writer.finish(header, self._key)

    def _plan(self, base_version: int | None, version: int) -> Iterator[tuple[Header, list[_Held]]]:
        """The frames to be: consecutive tensors of one layer, at most `_FRAME_BYTES` unless one alone has more."""
        groups: list[list[_Held]] = [[]]
        size, layer = 0, ""
        for held in self._state.values():
            match = _LAYER.match(held.spec.name)
            here = match.group() if match else ""
            if groups[-1] and (here != layer or size + held.bits.nbytes > _FRAME_BYTES):
                groups.append([])
                size = 0
            groups[-1].append(held)
            size, layer = size + held.bits.nbytes, here
        model = fingerprint(held.spec for held in self._state.values())
        for index, group in enumerate(groups):
            yield Header(index, len(groups), base_version, version, model), group

    @property
    def digest(self) -> str:
        """Of the last whole state, as `models.weights.digest` gives it."""
        return digest_of_state((held.spec, held.digest) for held in self._state.values())

    @property
    def fingerprint(self) -> str:
        """Of the names, dtypes and shapes."""
        return fingerprint(held.spec for held in self._state.values()).hex()

    @property
    def dense_bytes(self) -> int:
        return sum(held.bits.nbytes for held in self._state.values())


class DeltaReceiver:
    """Holds the weights of `version` in `tensors`, which it overwrites in place.

    Args:
        tensors: contiguous, on the CPU, writable. They are hashed once, and after each update those that changed.
        version: None where the tensors hold nothing yet.
        key: the sender's.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor | np.ndarray], version: int | None, *, key: bytes | None = None
    ) -> None:
        self._key = key
        self.version = version  # None: no whole one, only a keyframe is accepted
        self._held = {
            name: _Held(spec_of(name, tensor), _bits_in_place(name, tensor), b"") for name, tensor in tensors.items()
        }
        self._bits = {name: held.bits for name, held in self._held.items()}
        if version is not None:
            for held in self._held.values():
                held.digest = digest_of_bits(held.bits)

    def apply(self, frames: Sequence[Buffer], *, update: WeightsUpdate, sender: str) -> None:
        """Take an update: everything is checked, then written frame by frame, and what was written is hashed.

        Raises:
            DeltaError: refused. Nothing has changed, unless `version` is None now: then what was written is damaged.
        """
        if self.version is not None and update.version <= self.version:
            reason = f"it came already, version {self.version} is held"
            raise DeltaError(sender, update.version, reason, needs_keyframe=False)
        try:
            self._check_base(update.base_version)
            read = read_update(frames, update, self._key)
            self._check(read)
            self.version = None  # until all is written and proved
            for frame in read:
                self._write(frame)
        except ValueError as error:
            raise DeltaError(sender, update.version, str(error), needs_keyframe=True) from error
        self.version = update.version

    def forget(self) -> None:
        """Somebody else wrote to the tensors: only a keyframe is accepted from now on."""
        self.version = None

    def _check_base(self, base_version: int | None) -> None:
        if base_version is not None and base_version != self.version:
            held = "no whole version" if self.version is None else f"version {self.version}"
            raise ValueError(f"it builds on version {base_version}, {held} is held")

    def _check(self, frames: Sequence[Frame]) -> None:
        """Whether every tensor can be brought to its new bits; decodes all and keeps nothing."""
        records = [record for frame in frames for record in frame.records]
        for record in records:
            held = self._held.get(record.spec.name)
            if held is None:
                raise ValueError(f"{record.spec.name} is no tensor of this model")
            if record.spec != held.spec:
                raise ValueError(f"it brings {_described(record.spec)}, this model has {_described(held.spec)}")
            if record.encoding is not Encoding.DENSE and record.base_digest != held.digest:
                raise ValueError(f"{record.spec.name}: the bits held are not those that the change is for")
        missing = sorted(self._held.keys() - {record.spec.name for record in records})
        if missing:
            raise ValueError(f"it lacks {missing[0]}")
        for frame in frames:
            for _ in frame.changes(self._bits):
                pass

    def _write(self, frame: Frame) -> None:
        for record, change in frame.changes(self._bits):
            if change is None:
                continue
            held = self._held[record.spec.name]
            change.apply(held.bits)
            held.digest = digest_of_bits(held.bits)
            if held.digest != record.digest:
                raise ValueError(f"{record.spec.name}: its digest differs after the write, so the weights are damaged")


def read_update(frames: Sequence[Buffer], update: WeightsUpdate, key: bytes | None) -> list[Frame]:
    """The frames of an update, checked by themselves, against each other and against what the update says.

    Raises:
        ValueError: any of them is damaged, forged, missing, out of place, or of another update.
    """
    if len(frames) != update.num_frames:
        raise ValueError(f"{len(frames)} of {update.num_frames} frames came")
    read = []
    for index, data in enumerate(frames):
        try:
            frame = read_frame(data, key)
            _check_header(frame.header, index, update)
        except ValueError as error:
            raise ValueError(f"frame {index + 1} of {update.num_frames}: {error}") from error
        read.append(frame)
    num_bytes = sum(frame.num_bytes for frame in read)
    if num_bytes != update.num_bytes:
        raise ValueError(f"its frames have {num_bytes} bytes, {update.num_bytes} were announced")
    records = [record for frame in read for record in frame.records]
    for record in records:
        if update.is_keyframe and record.encoding is not Encoding.DENSE:
            raise ValueError(f"{record.spec.name}: a keyframe with a change in it")
        if record.encoding is Encoding.SAME and record.digest != record.base_digest:
            raise ValueError(f"{record.spec.name}: unchanged, but with a new digest")
    if len({record.spec.name for record in records}) != len(records):
        raise ValueError("a tensor comes twice")
    if fingerprint(record.spec for record in records).hex() != update.fingerprint:
        raise ValueError("it is not complete: the fingerprint is of more tensors or others")
    if digest_of_state((record.spec, record.digest) for record in records) != update.digest:
        raise ValueError("its digest is not the announced one")
    return read


def read_tensors(
    frames: Sequence[Buffer], *, update: WeightsUpdate, sender: str, key: bytes | None = None
) -> dict[str, Tensor]:
    """The tensors of a keyframe for which the receiver holds none: adapters.

    Raises:
        DeltaError: refused.
    """
    try:
        if not update.is_keyframe:
            raise ValueError(f"it builds on version {update.base_version}, a keyframe was expected")
        records = [record for frame in read_update(frames, update, key) for record in frame.records]
        tensors = {record.spec.name: _empty(record, update.num_bytes) for record in records}
    except ValueError as error:
        raise DeltaError(sender, update.version, str(error), needs_keyframe=True) from error
    DeltaReceiver(tensors, None, key=key).apply(frames, update=update, sender=sender)
    return tensors


def _check_header(header: Header, index: int, update: WeightsUpdate) -> None:
    if header.fingerprint.hex() != update.fingerprint:
        raise ValueError("it is for another model: names, dtypes or shapes differ")
    if (header.base_version, header.version) != (update.base_version, update.version):
        raise ValueError(f"it leads from version {header.base_version} to {header.version}")
    if (header.index, header.total) != (index, update.num_frames):
        raise ValueError(f"it is frame {header.index + 1} of {header.total}")


def _advance(held: _Held, came: tuple[str, Tensor | np.ndarray] | None, writer: FrameWriter) -> None:
    """Bring a tensor of the state to its new bits, and the change into the frame."""
    if came is None:
        raise ValueError(f"{held.spec.name} did not come")
    spec, bits = spec_of(*came), bits_of(came[1])
    if spec != held.spec:
        raise ValueError(f"{_described(spec)} came where {_described(held.spec)} was expected")
    base_digest, held.digest = held.digest, digest_of_bits(bits)
    writer.add_change(spec, held.bits, bits, base_digest, held.digest)
    np.copyto(held.bits, bits)


def _bits_in_place(name: str, tensor: Tensor | np.ndarray) -> Bits:
    if isinstance(tensor, Tensor):
        writable = tensor.device.type == "cpu" and tensor.is_contiguous()
    else:
        writable = tensor.flags.c_contiguous and tensor.flags.writeable
    if not writable:
        raise ValueError(f"{name}: weights are received in place, which takes contiguous, writable memory on the CPU")
    return bits_of(tensor)


def _empty(record: Record, most_bytes: int) -> Tensor:
    """Memory for a tensor that a frame brings whole, where as many bytes came."""
    dtype = _TORCH_DTYPES.get(record.spec.dtype)
    if dtype is None or math.prod(record.spec.shape) * dtype.itemsize > most_bytes:
        raise ValueError(f"it cannot bring {_described(record.spec)}")
    try:
        return torch.empty(record.spec.shape, dtype=dtype)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes of an empty tensor that torch cannot count
        raise ValueError(f"it cannot bring {_described(record.spec)}") from error


def _described(spec: Spec) -> str:
    return f"{spec.name} ({spec.dtype}, shape {spec.shape})"
