"""Sender side of the broadcast: one put into Ray's object store, any number of readers."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from torch import Tensor

from contracts.records import WeightsUpdate
from models.weights import digest, to_wire

# The reference travels inside a list, so that a driver that passes it on never fetches the weights itself.
WeightsRef = list["ray.ObjectRef"]


def publish(tensors: Mapping[str, Tensor], *, version: int) -> tuple[WeightsUpdate, WeightsRef]:
    """Put the bf16 weights of `version` where every engine can read them."""
    wire = to_wire(tensors)
    num_bytes = sum(array.nbytes for array in wire.values())
    update = WeightsUpdate(version=version, base_version=None, num_bytes=num_bytes, digest=digest(wire))
    return update, [ray.put(wire)]
