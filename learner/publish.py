"""Sender side of the broadcast: frames in Ray's object store, any number of readers."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import ray
from torch import Tensor

from contracts.records import WeightsUpdate
from models.weight_stream import DeltaSender

# A frame each, as an array that readers see without a copy. The references travel inside a list, so that a driver that
# passes them on never fetches the weights itself.
WeightsRefs = list["ray.ObjectRef"]


class Publisher:
    """Puts each version where every engine can read it, and on demand the last one as a keyframe.

    Calls may come from several threads: a keyframe asked for while a version is being published waits for it.

    Args:
        key: signs the frames.
        dense: every version is published as a keyframe.
    """

    def __init__(self, *, key: bytes | None = None, dense: bool = False) -> None:
        self._sender = DeltaSender(key=key, dense=dense)
        self._lock = threading.Lock()
        self._adapter_of: int | None = None
        self._keyframe: tuple[WeightsUpdate, WeightsRefs] | None = None

    def seed(self, tensors: Iterable[tuple[str, Tensor]], *, version: int, adapter_of: int | None = None) -> None:
        """Take over weights that the engines hold already as `version`; for `adapter_of` see `publish`."""
        with self._lock:
            self._keyframe, self._adapter_of = None, adapter_of
            self._sender.seed(tensors, version)

    def publish(
        self, tensors: Iterable[tuple[str, Tensor]], *, version: int, adapter_of: int | None = None
    ) -> tuple[WeightsUpdate, WeightsRefs]:
        """Publish `tensors`, which come one by one, as `version`.

        `adapter_of` is given where they are an adapter: the bytes of all weights of the policy.
        """
        with self._lock:
            self._keyframe, self._adapter_of = None, adapter_of
            base_version = self._sender.next_base
            refs, num_bytes = _put(self._sender.encode(tensors, version))
            published = self._update(version, base_version, num_bytes, len(refs)), refs
            if base_version is None:
                self._keyframe = published
            return published

    def keyframe(self) -> tuple[WeightsUpdate, WeightsRefs]:
        """The last published version, complete in itself; encoded once, kept until the next version.

        Raises:
            RuntimeError: no version is whole: nothing was published, or publishing failed.
        """
        with self._lock:
            if self._keyframe is None:
                refs, num_bytes = _put(self._sender.keyframe())
                assert self._sender.version is not None
                self._keyframe = self._update(self._sender.version, None, num_bytes, len(refs)), refs
            return self._keyframe

    def _update(self, version: int, base_version: int | None, num_bytes: int, num_frames: int) -> WeightsUpdate:
        return WeightsUpdate(
            version=version,
            base_version=base_version,
            num_bytes=num_bytes,
            digest=self._sender.digest,
            dense_bytes=self._sender.dense_bytes if self._adapter_of is None else self._adapter_of,
            is_adapter=self._adapter_of is not None,
            num_frames=num_frames,
            fingerprint=self._sender.fingerprint,
        )


def _put(frames: Iterable[memoryview]) -> tuple[WeightsRefs, int]:
    refs, num_bytes = [], 0
    for frame in frames:
        refs.append(ray.put(np.frombuffer(frame, np.uint8)))
        num_bytes += len(frame)
    return refs, num_bytes
