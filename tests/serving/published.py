"""A small policy in training, and what it publishes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from contracts.records import WeightsUpdate
from models.weight_stream import DeltaReceiver, DeltaSender
from serving.archive import Archive
from tests.models.test_weight_stream import clone, model, sent, sent_keyframe, trained

KEY = b"of the archive"

Sent = tuple[list[memoryview], WeightsUpdate]


class Trainer:
    """Publishes versions 1, 2, 3 of a model, and remembers the weights of each."""

    def __init__(
        self, *, key: bytes | None = KEY, seed: int = 0, size: int = 40, start: dict[str, Tensor] | None = None
    ) -> None:
        self.weights = {0: start or model(seed, size=size)}
        self.sender = DeltaSender(key=key)
        self.sender.seed(self.weights[0].items(), 0)
        self.version = 0

    def delta(self) -> Sent:
        self.version += 1
        self.weights[self.version] = trained(self.weights[self.version - 1], self.version)
        return self._own(sent(self.sender, self.weights[self.version], self.version))

    def keyframe(self) -> Sent:
        return self._own(sent_keyframe(self.sender))

    def _own(self, made: Sent) -> Sent:
        frames, update = made
        return [memoryview(bytes(frame)) for frame in frames], update

    def start(self) -> tuple[int, object]:
        """For `Archive(start=)`: what replicas begin with."""

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from self.weights[0].items()

        return 0, tensors


def arrive(archive: Archive, version: int, *, held: int | None, weights: dict[int, dict[str, Tensor]]) -> None:
    """Go the archive's way as a replica does that holds `held`, and prove that it ends at the weights of `version`."""
    tensors = clone(weights[0 if held is None else held])
    receiver = DeltaReceiver(tensors, held, key=KEY)
    for entry in archive.way(version, held=held):
        update, frames = archive.read(entry)
        if update.is_keyframe:
            receiver.forget()
        receiver.apply(frames, update=update, sender="the archive")
    assert receiver.version == version
    for name, expected in weights[version].items():
        assert torch.equal(tensors[name].view(torch.int16), expected.view(torch.int16)), name
