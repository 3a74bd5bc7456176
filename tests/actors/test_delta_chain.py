"""A thousand deltas of one model, delivered to receivers that stay, join late and are replaced: never a bit off."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.delivery import Delivery, WeightsAnswer
from contracts.records import WeightsUpdate
from learner.publish import Publisher
from models.weight_stream import DeltaError, DeltaReceiver
from models.weights import digest
from tests.command import Processes
from tests.conftest import RunCoroutine

VERSIONS = 1000
JOINS_AT, REPLACED_AT = 400, 700
KEY = b"secret of the run"


class Receiver:
    """The receiving half of a rollout actor, without the engine: it starts with the initial weights."""

    def __init__(self, name: str, folder: Path) -> None:
        self.actor_id, self.node, self.version = name, "", 0
        self.weights = initial(folder)
        self.receiver = DeltaReceiver(self.weights, 0, key=KEY)
        self.keyframes = 0
        self.handle: Any = SimpleNamespace(load_weights=SimpleNamespace(remote=self._load))

    async def _load(self, update: WeightsUpdate, payload: list[Any], *, deadline_s: float) -> WeightsAnswer:
        try:
            self.receiver.apply(await asyncio.gather(*payload), update=update, sender="the learner")
        except DeltaError as error:
            return WeightsAnswer(self.version, 0.0, refused=str(error))
        self.keyframes += update.is_keyframe
        return WeightsAnswer(update.version, 0.0)


def initial(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.slow
def test_a_thousand_deltas_arrive_bit_for_bit(ray_session: Processes, tiny_model: Path, run: RunCoroutine) -> None:
    async def chain() -> None:
        masters = {name: tensor.float().requires_grad_() for name, tensor in initial(tiny_model).items()}
        optimizer = torch.optim.AdamW(masters.values(), lr=1e-6)
        generator = torch.Generator().manual_seed(0)
        publisher, delivery = Publisher(key=KEY), Delivery(deadline_s=60)
        publisher.seed(initial(tiny_model).items(), version=0)

        async def keyframe() -> Any:
            return publisher.keyframe()

        delivery.ask_keyframe = keyframe
        engines = [Receiver("stays", tiny_model), Receiver("is replaced", tiny_model)]
        sizes = []
        for version in range(1, VERSIONS + 1):
            for tensor in masters.values():
                tensor.grad = torch.randn(tensor.shape, generator=generator)
            optimizer.step()
            sent = {name: tensor.detach().bfloat16() for name, tensor in masters.items()}
            update, payload = publisher.publish(sent.items(), version=version)
            sizes.append(update.num_bytes / update.dense_bytes)
            if version == JOINS_AT:
                engines.append(Receiver("joins late", tiny_model))
            if version == REPLACED_AT:
                engines[1] = Receiver("replaces", tiny_model)
            delivery.publish(update, payload)
            await asyncio.gather(*(delivery.bring_up_to_date(engine) for engine in engines))
            expected = digest(sent)
            assert update.digest == expected
            assert [(engine.version, digest(engine.weights)) for engine in engines] == [(version, expected)] * len(
                engines
            )
        assert [engine.keyframes for engine in engines] == [0, 1, 1]
        assert 0 < max(sizes) < 0.1  # deltas, not weights

    run(chain(), timeout_s=600)
