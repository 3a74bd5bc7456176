"""Frames: the wire form of weights, one message a layer, each checked by itself.

A frame is `header, records, table of streams, streams, tag`, little-endian. A record says of one tensor what it is
(name, dtype, shape), how it is encoded, and the digest of its new bits. SAME sends nothing. DENSE sends the bits as
they are. SPARSE sends for each changed value the gap to the one before and the step from old to new bits, both as
integers: an optimizer moves a value to its neighbour, so a step takes one or two bits where the value itself takes
eleven. A step must not be applied twice: the digest of the old bits travels too and is compared first. Gaps and steps
of all tensors of a frame are cut into byte planes, and each plane is compressed by itself (zstd): the high ones are
almost all zero.

The tag is BLAKE3 over all other bytes of the frame, keyed where sender and receiver share a key. Everything here raises
ValueError with a reason for bytes that are not a frame, and allocates no more than what arrived or what the receiver's
own tensors hold.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from blake3 import blake3

from models.weight_bits import DIGEST_BYTES, Bits, Spec, changed

FORMAT = 1

_MAGIC = b"HRWF"
_KEYED = 1
_NO_BASE = -1
_HEADER = struct.Struct(f"<4sBBIIIqq{DIGEST_BYTES}sQ")
_RECORD = struct.Struct(f"<BQ{DIGEST_BYTES}s{DIGEST_BYTES}sB")  # encoding, count, digests, axes; then lengths, texts
_STREAM = struct.Struct("<BQ")  # codec, bytes
_TAG_BYTES = 32
_KEY_CONTEXT = "headrace weight frames, format 1"

_GAP_PLANES, _STEP_PLANES = 4, 8
_SIGNS = _GAP_PLANES + _STEP_PLANES
_DENSE = _SIGNS + 1
_NUM_STREAMS = _DENSE + 1
_ZEROS, _RAW, _ZSTD = range(3)
_ZSTD_CODEC = pa.Codec("zstd", compression_level=1)
# Above it dense is chosen: decoding as many changes takes about fifteen times as long as copying all values.
_MAX_SPARSE_SHARE = 0.5
_MAX_SPARSE = 1 << 31  # values of a tensor: forged gaps of 32 bits then add up to less than 64

Buffer = bytes | bytearray | memoryview | np.ndarray


class Encoding(IntEnum):
    SAME, SPARSE, DENSE = range(3)


@dataclass(frozen=True)
class Record:
    """One tensor of a frame; `count` values are sent. With SPARSE `base_digest` is that of the old bits."""

    spec: Spec
    encoding: Encoding
    count: int
    base_digest: bytes
    digest: bytes


@dataclass(frozen=True)
class Header:
    """Where a frame belongs. `base_version` None: part of a keyframe, which is complete in itself."""

    index: int
    total: int
    base_version: int | None
    version: int
    fingerprint: bytes


class Change(NamedTuple):
    """New bits of a tensor: `values` at `indices` are to be added, modulo their width; without indices they are all."""

    indices: np.ndarray | None
    values: Bits

    def apply(self, bits: Bits) -> None:
        if self.indices is None:
            bits.view(np.uint8)[:] = self.values.view(np.uint8)
        else:
            bits[self.indices] += self.values


class FrameWriter:
    """Collects the tensors of one frame. What it is given must not change before `finish`."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._gaps: list[np.ndarray] = []
        self._negative: list[np.ndarray] = []
        self._magnitudes: list[Bits] = []
        self._dense: list[Bits] = []

    def add_dense(self, spec: Spec, bits: Bits, digest: bytes) -> None:
        """All values."""
        self._records.append(Record(spec, Encoding.DENSE, bits.size, bytes(DIGEST_BYTES), digest))
        self._dense.append(bits)

    def add_change(self, spec: Spec, old: Bits, new: Bits, base_digest: bytes, digest: bytes) -> None:
        """What differs, or all values where that is not worth it. `old` is not needed after the call."""
        if digest == base_digest:
            self._records.append(Record(spec, Encoding.SAME, 0, base_digest, digest))
            return
        indices = changed(old, new)
        gaps = np.diff(indices, prepend=-1) - 1
        steps = (new[indices] - old[indices]).view(f"i{new.itemsize}")
        magnitudes = np.abs(steps).view(new.dtype) - new.dtype.type(1)
        if new.size >= _MAX_SPARSE or not _sparse_is_worth_it(gaps, magnitudes, new.nbytes):
            self.add_dense(spec, new, digest)
            return
        self._records.append(Record(spec, Encoding.SPARSE, len(indices), base_digest, digest))
        self._gaps.append(gaps.astype(np.uint32))
        self._negative.append(steps < 0)
        self._magnitudes.append(magnitudes)

    def finish(self, header: Header, key: bytes | None) -> memoryview:
        """The bytes of the frame."""
        streams = [
            *(_compressed([_plane(gaps, number) for gaps in self._gaps]) for number in range(_GAP_PLANES)),
            *(
                _compressed([_plane(each, number) for each in self._magnitudes if each.itemsize > number])
                for number in range(_STEP_PLANES)
            ),
            _compressed([np.packbits(np.concatenate(self._negative), bitorder="little")] if self._negative else []),
            (_RAW, [bits.view(np.uint8).data for bits in self._dense]),
        ]
        records = b"".join(_packed(record) for record in self._records)
        lengths = [sum(part.nbytes for part in parts) for _, parts in streams]
        table = b"".join(_STREAM.pack(codec, size) for (codec, _), size in zip(streams, lengths, strict=True))
        num_bytes = _HEADER.size + len(records) + len(table) + sum(lengths) + _TAG_BYTES
        head = _HEADER.pack(
            _MAGIC,
            FORMAT,
            0 if key is None else _KEYED,
            header.index,
            header.total,
            len(self._records),
            _NO_BASE if header.base_version is None else header.base_version,
            header.version,
            header.fingerprint,
            num_bytes,
        )
        frame = np.empty(num_bytes, np.uint8).data
        at = 0
        for part in (
            *(memoryview(part) for part in (head, records, table)),
            *(part for _, parts in streams for part in parts),
        ):
            frame[at : at + len(part)] = part
            at += len(part)
        frame[at:] = _tag(frame[:at], key)
        return frame


class Frame(NamedTuple):
    """A frame whose tag fits. Its streams stay as they came until `changes`."""

    header: Header
    records: tuple[Record, ...]
    streams: tuple[tuple[int, memoryview], ...]
    num_bytes: int

    def changes(self, bits: Mapping[str, Bits]) -> Iterator[tuple[Record, Change | None]]:
        """What happens to each tensor, None where it stays. The receiver's `bits`, by name, bound all sizes.

        Raises:
            ValueError: records or streams contradict each other or do not fit the tensors.
        """
        for record in self.records:
            _check_count(record, bits[record.spec.name].size)
        streams = _Streams(self, bits)
        for record in self.records:
            if record.encoding is Encoding.SAME:
                yield record, None
            elif record.encoding is Encoding.DENSE:
                yield record, Change(None, streams.dense(record))
            else:
                indices, negative = streams.indices(record)
                values = streams.magnitudes(record) + bits[record.spec.name].dtype.type(1)
                np.negative(values, out=values, where=negative)
                yield record, Change(indices, values)


class _Streams:
    """The decompressed planes of a frame, consumed tensor by tensor."""

    def __init__(self, frame: Frame, bits: Mapping[str, Bits]) -> None:
        self._bits = bits
        sparse = [record for record in frame.records if record.encoding is Encoding.SPARSE]
        widths = [bits[record.spec.name].itemsize for record in sparse]
        count = sum(record.count for record in sparse)
        self._gaps = [_decompressed(stream, count) for stream in frame.streams[:_GAP_PLANES]]
        self._magnitudes = [
            _decompressed(stream, sum(each.count for each, width in zip(sparse, widths, strict=True) if width > number))
            for number, stream in enumerate(frame.streams[_GAP_PLANES:_SIGNS])
        ]
        signs = _decompressed(frame.streams[_SIGNS], (count + 7) // 8)
        self._negative = np.unpackbits(signs, count=count, bitorder="little").view(bool)
        dense = [record.spec.name for record in frame.records if record.encoding is Encoding.DENSE]
        self._dense = _decompressed(frame.streams[_DENSE], sum(bits[name].nbytes for name in dense))
        self._sparse_at, self._dense_at = 0, 0
        self._magnitudes_at = [0] * _STEP_PLANES

    def dense(self, record: Record) -> Bits:
        start = self._dense_at
        self._dense_at += self._bits[record.spec.name].nbytes
        return self._dense[start : self._dense_at]

    def indices(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Where the values of a tensor changed, ascending, and which of them became smaller integers."""
        part = slice(self._sparse_at, self._sparse_at + record.count)
        self._sparse_at = part.stop
        indices = _joined([plane[part] for plane in self._gaps], np.dtype(np.int64))
        size = self._bits[record.spec.name].size
        indices += 1
        np.cumsum(indices, out=indices)
        indices -= 1
        if not 0 <= indices[-1] < size:
            raise ValueError(f"{record.spec.name}: a changed value lies behind the end")
        return indices, self._negative[part]

    def magnitudes(self, record: Record) -> Bits:
        """The sizes of the steps, less one."""
        unsigned = self._bits[record.spec.name].dtype
        planes = []
        for number in range(unsigned.itemsize):
            start = self._magnitudes_at[number]
            self._magnitudes_at[number] += record.count
            planes.append(self._magnitudes[number][start : start + record.count])
        return _joined(planes, unsigned)


def read_frame(data: Buffer, key: bytes | None) -> Frame:
    """Check the tag and take the frame apart; nothing is decompressed.

    Raises:
        ValueError: truncated, damaged, not a frame, or not from the holder of the key.
    """
    whole = (data.data if isinstance(data, np.ndarray) else memoryview(data)).cast("B")
    if frame_bytes(whole) != len(whole):
        raise ValueError(f"it has {len(whole)} bytes of {frame_bytes(whole)}")
    _, _, flags, index, total, num_records, base, version, fingerprint, _ = _HEADER.unpack_from(whole)
    if flags not in (0, _KEYED) or (flags == _KEYED) != (key is not None):
        raise ValueError("it is not signed" if key is not None else "it is signed with a key that is not known here")
    if not hmac.compare_digest(whole[-_TAG_BYTES:], _tag(whole[:-_TAG_BYTES], key)):
        raise ValueError("its signature does not fit" if key is not None else "it is damaged: its checksum differs")
    rest = whole[_HEADER.size : -_TAG_BYTES]
    records = []
    for _ in range(num_records):
        record, rest = _unpacked(rest)
        records.append(record)
    table, rest = _cut(rest, _NUM_STREAMS * _STREAM.size)
    streams = []
    for codec, size in _STREAM.iter_unpack(table):
        stream, rest = _cut(rest, size)
        streams.append((codec, stream))
    if len(rest):
        raise ValueError(f"{len(rest)} bytes belong to no stream")
    if index >= total or version < 0 or base < _NO_BASE:
        raise ValueError(f"it is frame {index} of {total} from version {base} to {version}")
    header = Header(index, total, None if base == _NO_BASE else base, version, fingerprint)
    return Frame(header, tuple(records), tuple(streams), len(whole))


def frame_bytes(data: memoryview) -> int:
    """How many bytes the frame at the start of `data` has, by its own account.

    Raises:
        ValueError: no frame of this format starts there.
    """
    if len(data) < _HEADER.size + _TAG_BYTES:
        raise ValueError(f"{len(data)} bytes are too few for a frame")
    magic, version_of_format, *_, num_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC or version_of_format != FORMAT:
        raise ValueError(f"it is no weight frame of format {FORMAT}")
    return int(num_bytes)


def _tag(data: memoryview, key: bytes | None) -> bytes:
    if key is None:
        return bytes(blake3(data).digest())
    return bytes(blake3(data, key=blake3(key, derive_key_context=_KEY_CONTEXT).digest()).digest())


def _packed(record: Record) -> bytes:
    name, dtype = record.spec.name.encode(), record.spec.dtype.encode()
    shape = record.spec.shape
    fixed = _RECORD.pack(record.encoding, record.count, record.base_digest, record.digest, len(shape))
    return fixed + struct.pack(f"<{len(shape)}QHB", *shape, len(name), len(dtype)) + name + dtype


def _unpacked(data: memoryview) -> tuple[Record, memoryview]:
    fixed, data = _cut(data, _RECORD.size)
    encoding, count, base_digest, digest, axes = _RECORD.unpack(fixed)
    lengths, data = _cut(data, struct.calcsize(f"<{axes}QHB"))
    *shape, name_bytes, dtype_bytes = struct.unpack(f"<{axes}QHB", lengths)
    name, data = _cut(data, name_bytes)
    dtype, data = _cut(data, dtype_bytes)
    spec = Spec(str(name, "utf-8"), str(dtype, "utf-8"), tuple(shape))
    return Record(spec, Encoding(encoding), count, base_digest, digest), data


def _cut(data: memoryview, size: int) -> tuple[memoryview, memoryview]:
    if size > len(data):
        raise ValueError(f"{size} bytes expected, {len(data)} left")
    return data[:size], data[size:]


def _check_count(record: Record, size: int) -> None:
    least, most = {Encoding.SAME: (0, 0), Encoding.SPARSE: (1, size), Encoding.DENSE: (size, size)}[record.encoding]
    if not least <= record.count <= most or (record.encoding is Encoding.SPARSE and size >= _MAX_SPARSE):
        raise ValueError(f"{record.spec.name}: {record.count} changed values of {size}")


def _sparse_is_worth_it(gaps: np.ndarray, magnitudes: Bits, dense_bytes: int) -> bool:
    """Whether the changes take a small enough share of all values; by entropy where raw planes do not decide it."""
    count, most_bytes = len(gaps), _MAX_SPARSE_SHARE * dense_bytes
    widths = [(int(each.max()).bit_length() + 7) // 8 for each in (gaps, magnitudes)]
    if count * sum(widths) + count / 8 < most_bytes:
        return True
    planes = [_plane(each, n) for each, width in zip((gaps, magnitudes), widths, strict=True) for n in range(width)]
    return sum(_entropy_bytes(plane) for plane in planes) + count / 8 < most_bytes


def _entropy_bytes(plane: np.ndarray) -> float:
    """What an ideal code of single bytes takes."""
    shares = np.bincount(plane, minlength=256) / len(plane)
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum()) * len(plane) / 8


def _plane(values: np.ndarray, number: int) -> np.ndarray:
    """One byte of each value, the lowest first."""
    return values.view(np.uint8).reshape(-1, values.itemsize)[:, number]


def _compressed(planes: Sequence[np.ndarray]) -> tuple[int, list[memoryview]]:
    """Codec and parts of a stream."""
    plane = np.concatenate(planes) if planes else np.zeros(0, np.uint8)
    if not plane.any():
        return _ZEROS, []
    small = memoryview(_ZSTD_CODEC.compress(plane, asbytes=True))  # pyarrow's own buffer claims a wrong length
    return (_ZSTD, [small]) if len(small) < len(plane) else (_RAW, [plane.data])


def _decompressed(stream: tuple[int, memoryview], size: int) -> np.ndarray:
    """`size` bytes.

    Raises:
        ValueError: the stream holds another number of them.
    """
    codec, data = stream
    if codec == _ZEROS and not len(data):
        return np.zeros(size, np.uint8)  # pages of zeros that are only read take no memory
    if codec == _ZSTD and size:
        try:
            return np.frombuffer(_ZSTD_CODEC.decompress(data, size), np.uint8)
        except OSError as error:
            raise ValueError(f"a stream cannot be decompressed: {error}") from error
    if codec != _RAW or len(data) != size:
        raise ValueError(f"a stream has {len(data)} bytes, {size} expected")
    return np.frombuffer(data, np.uint8)


def _joined(planes: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Values from their byte planes, the lowest first."""
    values = np.zeros(len(planes[0]), dtype)
    by_byte = values.view(np.uint8).reshape(-1, dtype.itemsize)
    for number, plane in enumerate(planes):
        by_byte[:, number] = plane
    return values
