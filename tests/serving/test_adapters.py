"""LoRA adapters as versions: kept, rolled back and refused by the version keeper, and taken by a replica."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from contracts.records import WeightsUpdate
from contracts.serving import ServingConfig
from models.engine_adapters import AdapterSettings
from models.engine_shadow import policy_tensors
from models.engine_update import UpdateTimes, WeightsError
from models.weight_stream import DeltaError, DeltaSender, read_tensors
from serving.records import Order, StartWeights
from serving.taking import Taking
from serving.versions import VersionKeeper
from tests.conftest import RunCoroutine
from tests.models.test_engine_adapters import LORA, adapter, saved
from tests.models.test_weight_stream import sent
from tests.serving.published import KEY, Trainer
from tests.serving.test_mixed import ScriptedEngine, Talk, following
from tests.serving.test_mixed import until as there
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.usefixtures("ray_session")

ADAPTERS = AdapterSettings(LORA)
ALL_BYTES = 1_000_000  # what all weights of the policy take, for all that the keeper knows


class AdapterTrainer:
    """Publishes version N with the adapter of seed N, or of another; that of seed 0 changes nothing."""

    def __init__(self, model: Path, key: bytes = KEY) -> None:
        self._model, self._sender = model, DeltaSender(key=key, dense=True)

    def publish(self, version: int, seed: int | None = None) -> tuple[WeightsUpdate, list["ray.ObjectRef"]]:
        frames, update = sent(self._sender, adapter(self._model, version if seed is None else seed), version)
        refs = [ray.put(np.frombuffer(bytes(frame), np.uint8)) for frame in frames]
        return replace(update, is_adapter=True, dense_bytes=ALL_BYTES), refs


async def told(keeper: VersionKeeper, held: int | None) -> tuple[int, dict[str, Tensor]]:
    """The version that a replica is to serve that holds `held`, and its adapter as it arrives."""
    order: Order | None = await keeper.order("live", "a", held, 0, 0.0)
    assert order is not None
    ((update, refs),) = order.steps
    await keeper.served("live", "a", order.version)
    return order.version, read_tensors(await asyncio.gather(*refs), update=update, sender="the keeper", key=KEY)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_versions_are_adapters_and_the_first_is_the_one_that_was_started_with(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    base = build_tiny_model(tmp_path / "base", tied=True)
    start = StartWeights(str(base), 7, adapters=replace(ADAPTERS, initial=str(saved(tmp_path, 1))))

    async def check() -> None:
        keeper = VersionKeeper(ServingConfig(), tmp_path / "serving", start, key=KEY)
        trainer = AdapterTrainer(base)
        for version in (8, 9, 10):
            await keeper.publish(*trainer.publish(version))
        assert (await keeper.status())["versions"] == [7, 8, 9, 10]
        version, arrived = await told(keeper, 7)
        assert (version, same(arrived, adapter(base, 10))) == (10, True)
        await keeper.rollback(7)
        version, arrived = await told(keeper, 10)
        assert (version, same(arrived, adapter(base, 1))) == (7, True)
        await keeper.pin("9")

        again = VersionKeeper(ServingConfig(), tmp_path / "serving", start, key=KEY)
        assert (await again.status())["current"] == 9
        version, arrived = await told(again, None)
        assert (version, same(arrived, adapter(base, 9))) == (9, True)

    run(check())


def test_an_adapter_and_whole_weights_do_not_stand_for_each_other(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        whole = VersionKeeper(ServingConfig(), tmp_path / "whole", StartWeights(str(tiny_model), 0), key=KEY)
        with pytest.raises(ValueError, match="version 1 is a LoRA adapter, and this application serves whole weights"):
            await whole.publish(*AdapterTrainer(tiny_model).publish(1))
        start = StartWeights(str(tiny_model), 0, adapters=ADAPTERS)
        adapters = VersionKeeper(ServingConfig(), tmp_path / "adapters", start, key=KEY)
        frames, update = Trainer(start=policy_tensors(str(tiny_model), "bfloat16")).delta()
        with pytest.raises(ValueError, match="version 1 is whole weights, and this application serves LoRA adapters"):
            await adapters.publish(update, [ray.put(np.frombuffer(frame, np.uint8)) for frame in frames])
        for keeper in (whole, adapters):
            assert (await keeper.status())["versions"] == [0]

        await adapters.publish(*AdapterTrainer(tiny_model).publish(1))
        merged = VersionKeeper(ServingConfig(), tmp_path / "adapters", StartWeights(str(tiny_model), 1), key=KEY)
        status = await merged.status()  # of the same run, but what its training published is of no use to it
        assert (status["current"], status["versions"]) == (1, [1])
        again = VersionKeeper(ServingConfig(), tmp_path / "adapters", start, key=KEY)
        assert (await again.status())["versions"] == [0, 1]

    run(check())


def test_a_replica_takes_adapters_while_it_writes(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for an answer of the version before, and a rollback brings the first adapter back."""

    async def check() -> None:
        async with following(ServingConfig(), tiny_model, tmp_path, monkeypatch, ADAPTERS) as ends:
            replica, engine, keeper, _ = ends
            long = Talk(replica)
            await there(lambda: len(long.written) > 2)
            await keeper.publish(*AdapterTrainer(tiny_model).publish(1))
            await there(lambda: engine.version == 1)
            assert same(engine.shadow_tensors, adapter(tiny_model, 1))
            short = Talk(replica)
            short.ends.set()
            await asyncio.wait_for(short.task, 5)
            assert not long.task.done()
            assert short.head is not None
            assert (short.head.status, short.head.version) == (200, 1)
            await keeper.rollback(0)
            await there(lambda: engine.version == 0)
            assert same(engine.shadow_tensors, adapter(tiny_model, 0))
            long.ends.set()
            await asyncio.wait_for(long.task, 5)

    run(check())


def test_what_is_no_adapter_or_does_not_fit_is_refused(tiny_model: Path, run: RunCoroutine) -> None:
    class Other(ScriptedEngine):
        async def load_adapter(self, version: int, tensors: dict[str, Tensor], *, deadline_s: float) -> UpdateTimes:
            raise ValueError("weights: no tensor of that name")

    async def check() -> None:
        taking = await Taking.into(Other({}, takes_adapters=True), KEY)  # type: ignore[arg-type]
        update, refs = AdapterTrainer(tiny_model).publish(1)
        frames = await asyncio.gather(*refs)
        with pytest.raises(WeightsError, match="no tensor of that name"):
            await taking.take(1, [update], [frames], deadline_s=5.0)
        with pytest.raises(DeltaError, match="version 1 from the version keeper refused: it is no adapter"):
            await taking.take(1, [replace(update, is_adapter=False)], [frames], deadline_s=5.0)
        with pytest.raises(DeltaError, match="its signature does not fit"):
            await Taking(Other({}), None, b"another key").take(1, [update], [frames], deadline_s=5.0)  # type: ignore[arg-type]
        assert taking.held == 0

    run(check())
