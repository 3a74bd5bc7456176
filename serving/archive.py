"""The weights of published versions on disk, and the way from any version to any other.

A version is a file of frames as training sent them: `version-000012-delta.frames` leads from its base to it,
`version-000012-keyframe.frames` is complete in itself. It may have both. Layout: 8 bytes with the header's length, the
header (JSON: the update, and the bytes of each frame), the frames. A file is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from torch import Tensor

from contracts.disk import DiskFull, is_full, room
from contracts.records import SCHEMA_VERSION, WeightsUpdate
from models.weight_frames import Buffer
from models.weight_stream import DeltaSender, read_update

_NAME = re.compile(r"version-(\d{6,})-(delta|keyframe)\.frames")
_MOST_HEADER_BYTES = 1 << 24

Digests = dict[str, tuple[bytes, bytes]]  # of each tensor: of its old bits and of its new ones


class NeedsKeyframe(ValueError):
    """A delta that builds on nothing that is held; a keyframe would do."""


class Unreachable(ValueError):
    """No way leads to a version from what is on disk."""


class Damaged(ValueError):
    """A file does not hold what was written to it. It was set aside, and counts no more."""


@dataclass(frozen=True)
class Entry:
    """An update on disk."""

    update: WeightsUpdate
    path: Path


def weights_key(folder: Path) -> bytes:
    """What signs the frames of everybody who publishes into `folder`, made on first use; readable by its owner alone.

    Raises:
        ValueError: the file is not such a key.
    """
    path = folder / "weights.key"
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"weights.key.{secrets.token_hex(8)}"
    try:
        if not path.exists():
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # two began at once: the first one's counts
                os.link(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    text = path.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"{path} does not hold a key of 64 hexadecimal digits; remove it and {folder / 'weights'}")
    return bytes.fromhex(text)


class Archive:
    """Updates by version. Not for two processes at once.

    Args:
        folder: is made, and what was half-written there removed.
        keyframe_every: how many deltas may lie between a keyframe and the newest version.
        start: the version that replicas load from elsewhere when they start, and what gives its tensors. It becomes a
            keyframe with the first update, so that a way leads back to it.
        key: of the frames.
        adapters: every version is a LoRA adapter; else none is. What is in the folder of the other kind, from another
            application of the run, does not count and stays.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keyframe_every: int,
        start: tuple[int, Callable[[], Iterable[tuple[str, Tensor]]]] | None = None,
        key: bytes | None = None,
        adapters: bool = False,
    ) -> None:
        self._folder, self._keyframe_every, self._start, self._key = folder, keyframe_every, start, key
        self._adapters = adapters
        self._deltas: dict[int, Entry] = {}
        self._keyframes: dict[int, Entry] = {}
        self._digests: tuple[int, Digests] | None = None  # of the version added last
        self.set_aside: list[str] = []  # what was found damaged, and why
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.partial"):
            path.unlink()
        for path in sorted(folder.glob("*.frames")):
            with contextlib.suppress(Damaged):
                entry = self._entry(path)
                if entry.update.is_adapter == adapters:
                    self._insert(entry)

    @property
    def versions(self) -> list[int]:
        """Those that a way leads to, ascending."""
        reachable: dict[int, None] = {}
        for version in sorted(self._deltas.keys() | self._keyframes.keys()):
            if version in self._keyframes or self._deltas[version].update.base_version in reachable:
                reachable[version] = None
        return list(reachable)

    @property
    def num_bytes(self) -> int:
        return sum(entry.update.num_bytes for entry in self._entries())

    @property
    def wants_keyframe(self) -> bool:
        """Whether the way to the newest version has become long."""
        newest = max(self._deltas.keys() | self._keyframes.keys(), default=None)
        if newest is None:
            return False
        try:
            return len(self.way(newest)) > self._keyframe_every
        except Unreachable:
            return True

    def add(self, update: WeightsUpdate, frames: Sequence[Buffer]) -> bool:
        """Check an update and write it; False where it is here already.

        Raises:
            NeedsKeyframe: it builds on what is not here.
            ValueError: it is damaged or forged, of another model, or its version is here with other weights.
            DiskFull: nothing of it was written.
        """
        self._check_kind(update)
        read = read_update(frames, update, self._key)
        if self._is_here(update):
            return False
        self._check_newest(update)
        self._add_start(update)
        records = [record for frame in read for record in frame.records]
        digests = {record.spec.name: (record.base_digest, record.digest) for record in records}
        if update.base_version is not None:
            self._check_base(update, digests)
        self._write(update, frames)
        self._digests = (update.version, digests)
        return True

    def _check_kind(self, update: WeightsUpdate) -> None:
        if update.is_adapter == self._adapters:
            return
        if update.is_adapter:
            raise ValueError(
                f"version {update.version} is a LoRA adapter, and this application serves whole weights: start it from "
                "the run's configuration, with training.lora and without serving.model"
            )
        raise ValueError(
            f"version {update.version} is whole weights, and this application serves LoRA adapters: start it without "
            "training.lora"
        )

    def _is_here(self, update: WeightsUpdate) -> bool:
        held = self._deltas.get(update.version) or self._keyframes.get(update.version)
        if held is None:
            return False
        if held.update.digest != update.digest:
            raise ValueError(
                f"version {update.version} is in {self._folder} with other weights: another run published it. Serve "
                "this one under another output_dir, or remove that folder"
            )
        same_kind = self._keyframes if update.is_keyframe else self._deltas
        # A keyframe makes a delta of the same version needless, where it leads there.
        return update.version in same_kind or (not update.is_keyframe and update.version in self._keyframes)

    def _check_newest(self, update: WeightsUpdate) -> None:
        newest = max(self._entries(), key=lambda entry: entry.update.version, default=None)
        if newest is None:
            return
        if newest.update.fingerprint != update.fingerprint:
            raise ValueError(
                f"version {update.version} is of another model than version {newest.update.version} in {self._folder}: "
                "names, dtypes or shapes differ"
            )
        known = update.version in self._deltas or update.version in self._keyframes
        if update.version < newest.update.version and not known:
            raise ValueError(
                f"version {update.version} comes after version {newest.update.version}, which is in {self._folder}"
            )

    def _check_base(self, update: WeightsUpdate, digests: Digests) -> None:
        """Every tensor's change must be for the bits that its base has."""
        base = update.base_version
        assert base is not None
        if not self._reachable(base):
            raise NeedsKeyframe(f"version {update.version} builds on version {base}, which is not here")
        held = self._digests_of(base)
        for name, (old, _) in digests.items():
            if old != bytes(len(old)) and held[name][1] != old:
                raise NeedsKeyframe(f"version {update.version} builds on another version {base}: {name} differs")

    def _digests_of(self, version: int) -> Digests:
        if self._digests is None or self._digests[0] != version:
            update, frames = self.read(self._deltas.get(version) or self._keyframes[version])
            records = [record for frame in read_update(frames, update, self._key) for record in frame.records]
            digests = {record.spec.name: (record.base_digest, record.digest) for record in records}
            self._digests = version, digests
        return self._digests[1]

    def keep_start(self) -> None:
        """Let a way lead to the start version.

        Raises:
            DiskFull: there is no room for it.
        """
        if self._start is not None and not self._reachable(self._start[0]):
            newest = max(self._entries(), key=lambda entry: entry.update.version, default=None)
            self._write_start(newest.update.dense_bytes if newest else None)

    def _add_start(self, update: WeightsUpdate) -> None:
        """Before anything else is here, or where it is what an update builds on."""
        if self._start is None or self._reachable(self._start[0]):
            return
        if not self._entries() or update.base_version == self._start[0]:
            self._write_start(update.dense_bytes)

    def _write_start(self, dense_bytes: int | None) -> None:
        """`dense_bytes` are those of another version: an adapter does not tell how large its model is."""
        assert self._start is not None
        version, tensors = self._start
        sender = DeltaSender(key=self._key)
        frames = list(sender.encode(tensors(), version))
        self._write(
            WeightsUpdate(
                version=version,
                base_version=None,
                num_bytes=sum(map(len, frames)),
                digest=sender.digest,
                dense_bytes=dense_bytes or sender.dense_bytes,
                is_adapter=self._adapters,
                num_frames=len(frames),
                fingerprint=sender.fingerprint,
            ),
            frames,
        )

    def way(self, version: int, *, held: int | None = None) -> list[Entry]:
        """What leads from `held` (None: nothing) to `version`: deltas, or a keyframe and the deltas after it.

        The one with fewer bytes, where both are there. Empty where it is held.

        Raises:
            Unreachable: none does; says which versions can be had.
        """
        ways: list[list[Entry]] = []
        steps: list[Entry] = []
        at = version
        while held is None or at != held:
            if at in self._keyframes:
                ways.append([self._keyframes[at], *reversed(steps)])
            if at not in self._deltas or (ways and held is None):
                break
            steps.append(self._deltas[at])
            base = self._deltas[at].update.base_version
            assert base is not None
            at = base
        else:
            ways.append(steps[::-1])
        if not ways:
            raise Unreachable(f"the weights of version {version} are not in {self._folder}, {self._what_is_here()}")
        return min(ways, key=lambda way: sum(entry.update.num_bytes for entry in way))

    def _reachable(self, version: int) -> bool:
        return version in self.versions

    def _what_is_here(self) -> str:
        versions = self.versions
        if not versions:
            return "none are"
        first, last = versions[0], versions[-1]
        if len(versions) == last - first + 1 and len(versions) > 1:
            return f"those of versions {first} to {last} are"
        return f"those of {', '.join(map(str, versions))} are"

    def read(self, entry: Entry) -> tuple[WeightsUpdate, list[np.ndarray]]:
        """The frames of an update, checked.

        Raises:
            Damaged: its file is not as it was written, or gone; the ways through it are closed from now on.
        """
        try:
            data = np.fromfile(entry.path, np.uint8)
            update, sizes, begin = _header(data[: 8 + _MOST_HEADER_BYTES].tobytes())
            if update != entry.update:
                raise ValueError("its header has changed")
            cuts = list(accumulate(sizes, initial=begin))
            if cuts[-1] != len(data):
                raise ValueError(f"it has {len(data)} bytes of {cuts[-1]}")
            frames = [data[start:end] for start, end in pairwise(cuts)]
            read_update(frames, update, self._key)
        except (OSError, ValueError) as error:
            raise self._put_aside(entry.path, error) from error
        return update, frames

    def drop_all_but(self, newest: int, others: Collection[int]) -> list[int]:
        """Remove what no way to the `newest` so many versions or to `others` needs; returns the versions that go."""
        before = self.versions
        kept = {*before[-newest:], *others} & set(before)
        needed = {entry.path for version in kept for entry in self.way(version)}
        for entry in self._entries():
            if entry.path not in needed:
                self._forget(entry.path)
                entry.path.unlink(missing_ok=True)
        return sorted({*before} - {*self.versions})

    def _write(self, update: WeightsUpdate, frames: Sequence[Buffer]) -> None:
        kind = "keyframe" if update.is_keyframe else "delta"
        path = self._folder / f"version-{update.version:06d}-{kind}.frames"
        beside = path.with_name(f"{path.name}.partial")
        header = {
            "schema_version": SCHEMA_VERSION,
            "update": asdict(update),
            "frames": [frame.nbytes if isinstance(frame, np.ndarray) else len(frame) for frame in frames],
        }
        packed = json.dumps(header).encode()
        try:
            with beside.open("wb") as file:
                file.write(len(packed).to_bytes(8, "little") + packed)
                for frame in frames:
                    file.write(frame.data if isinstance(frame, np.ndarray) else frame)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
            _sync(self._folder)
        except OSError as error:
            beside.unlink(missing_ok=True)
            if not is_full(error):
                raise
            where = room(self._folder, needed_bytes=update.num_bytes)
            raise DiskFull(f"no room for the weights of version {update.version}: {where}") from error
        self._insert(Entry(update, path))

    def _entry(self, path: Path) -> Entry:
        try:
            with path.open("rb") as file:
                length = file.read(8)
                update, sizes, begin = _header(length + file.read(min(_length(length), _MOST_HEADER_BYTES)))
            size, match = path.stat().st_size, _NAME.fullmatch(path.name)
            if match is None or (int(match[1]), match[2] == "keyframe") != (update.version, update.is_keyframe):
                raise ValueError(f"it holds version {update.version}, base {update.base_version}")
            if begin + sum(sizes) != size:
                raise ValueError(f"it has {size} bytes of {begin + sum(sizes)}")
        except (OSError, ValueError) as error:
            raise self._put_aside(path, error) from error
        return Entry(update, path)

    def _put_aside(self, path: Path, error: Exception) -> Damaged:
        self._forget(path)
        self._digests = None
        reason = f"{path} is damaged, and set aside as {path.name}.damaged: {error}"
        with contextlib.suppress(OSError):  # gone already, or the disk is
            path.rename(path.with_name(f"{path.name}.damaged"))
        self.set_aside.append(reason)
        return Damaged(reason)

    def _insert(self, entry: Entry) -> None:
        kind = self._keyframes if entry.update.is_keyframe else self._deltas
        kind[entry.update.version] = entry

    def _forget(self, path: Path) -> None:
        for kind in (self._deltas, self._keyframes):
            for version in [version for version, entry in kind.items() if entry.path == path]:
                del kind[version]

    def _entries(self) -> Sequence[Entry]:
        return (*self._deltas.values(), *self._keyframes.values())


def _header(data: bytes) -> tuple[WeightsUpdate, list[int], int]:
    """The update, the bytes of its frames, and where they begin."""
    length = _length(data)
    try:
        found = json.loads(data[8 : 8 + length])
        update, sizes = WeightsUpdate(**found["update"]), found["frames"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    base = update.base_version
    whole = (update.version, 0 if base is None else base, *sizes)
    if not all(isinstance(number, int) and number >= 0 for number in whole) or (base or -1) >= update.version:
        raise ValueError("its header makes no sense")
    return update, sizes, 8 + length


def _length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _sync(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
