"""Sender side of the broadcast: one put into Ray's object store, any number of readers."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from torch import Tensor

from contracts.records import WeightsUpdate
from models.weights import digest, to_wire

# The reference travels inside a list, so that a driver that passes it on never fetches the weights itself.
WeightsRef = list["ray.ObjectRef"]


def publish(
    tensors: Mapping[str, Tensor], *, version: int, dense_bytes: int | None = None
) -> tuple[WeightsUpdate, WeightsRef]:
    """Put the bf16 weights of `version` where every engine can read them.

    `dense_bytes` is given where they are an adapter: what all weights of the policy would take.
    """
    wire = to_wire(tensors)
    num_bytes = sum(array.nbytes for array in wire.values())
    update = WeightsUpdate(
        version=version,
        base_version=None,
        num_bytes=num_bytes,
        digest=digest(wire),
        dense_bytes=num_bytes if dense_bytes is None else dense_bytes,
        is_adapter=dense_bytes is not None,
    )
    return update, [ray.put(wire)]
