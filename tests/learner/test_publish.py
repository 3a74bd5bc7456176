"""What the learner publishes: deltas that lead from what engines loaded to each version, and keyframes at any time."""

import asyncio
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from contracts.events import Event
from learner.publish import Publisher
from learner.rank import LearnerSettings
from models.weight_stream import DeltaError, DeltaReceiver, read_tensors
from models.weights import digest
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.learner.test_group import batch, group, settings, trained

KEY = b"secret of the run"


def policy(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """What an engine loads from a folder."""
    return {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}


def receiver(folder: Path, version: int, dtype: torch.dtype = torch.bfloat16) -> tuple[DeltaReceiver, dict[str, Any]]:
    held = policy(folder, dtype)
    return DeltaReceiver(held, version, key=KEY), held


def signed(model: Path, **options: Any) -> LearnerSettings:
    return replace(settings(model), weights_key=KEY, **options)


async def take(into: DeltaReceiver, sent: Any) -> Any:
    update, payload = sent
    into.apply(await asyncio.gather(*payload), update=update, sender="the learner")
    return update


def test_deltas_lead_from_the_initial_model_to_each_version(
    ray_session: Processes, tiny_model: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        engine, held = receiver(tiny_model, 0)
        async with group(2, signed(tiny_model)) as made:
            update, _ = await made.keyframe()  # before anything was published
            assert (update.version, update.base_version, update.digest) == (0, None, digest(held))
            for version in (1, 2):
                await made.step(batch(version), training_version=version - 1)
                update = await take(engine, await made.publish(version))
                assert (update.version, update.base_version) == (version, version - 1)
                assert update.digest == digest(held)
                assert update.dense_bytes == sum(tensor.nbytes for tensor in held.values())
            late, late_held = receiver(tiny_model, 0)
            assert (await take(late, await made.keyframe())).is_keyframe
            assert digest(late_held) == digest(held) != digest(policy(tiny_model))

    run(check())


@pytest.mark.slow
def test_dense_and_float32(ray_session: Processes, tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    """float32 engines are sent float32: also those that a resumed run starts from a checkpoint's bf16 folder."""

    async def check() -> None:
        chosen = signed(tiny_model, weights_dtype="float32")
        engine, held = receiver(tiny_model, 0, torch.float32)
        async with group(1, chosen) as made:
            await made.step(batch(1), training_version=0)
            assert (await take(engine, await made.publish(1))).base_version == 0
            assert any((tensor != tensor.bfloat16()).any() for tensor in held.values())
            await made.save(tmp_path)
        resumed, held = receiver(tmp_path / "policy", 1, torch.float32)
        async with group(1, chosen, snapshot=tmp_path / "state", step=1) as made:
            update, _ = await made.keyframe()
            assert update.digest == digest(held)
            await made.step(batch(2), training_version=1)
            assert (await take(resumed, await made.publish(2))).base_version == 1
        async with group(1, replace(chosen, weights="dense"), snapshot=tmp_path / "state", step=1) as made:
            update, _ = await made.publish(2)
            assert update.is_keyframe
            assert update.dense_bytes <= update.num_bytes < 1.1 * update.dense_bytes

    run(check())


@pytest.mark.slow
def test_replaced_ranks_go_on_from_the_published_version(
    ray_session: Processes, tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    """Rank 0 dies after publishing version 2, with a checkpoint of step 1: no engine needs a keyframe.

    Before that, a keyframe comes while a step runs: its answer is there first.
    """

    async def check() -> None:
        notes: list[Event] = []
        engine, held = receiver(tiny_model, 0)
        async with group(1, signed(tiny_model), notes=notes) as made:
            for version in (1, 2):
                step = asyncio.ensure_future(made.step(batch(version), training_version=version - 1))
                await asyncio.sleep(0.05)
                keyframe = await made.keyframe()
                assert not step.done()
                assert keyframe[0].version == version - 1
                assert await made.keyframe() == keyframe  # encoded once
                await step
                await take(engine, await made.publish(version))
                if version == 1:
                    await made.save(tmp_path)
                    made.checkpointed(1, tmp_path / "state")
            published = digest(held)
            os.kill(await made.pid(0), signal.SIGKILL)
            waiting = asyncio.ensure_future(made.keyframe())  # answered by the new rank 0
            await made.step(batch(3), training_version=2)
            assert [event.event for event in notes] == ["start", "death", "restart"]
            update, _ = await waiting
            assert (update.version, update.digest) == (2, published)
            assert (await take(engine, await made.publish(3))).base_version == 2

    run(check())


@pytest.mark.slow
def test_ranks_that_do_not_know_the_published_version_publish_a_keyframe(
    ray_session: Processes, tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    """The checkpoint is newer than what was published: nothing can tell what the engines hold."""

    async def check() -> None:
        engine, held = receiver(tiny_model, 0)
        async with group(1, signed(tiny_model), notes=[]) as made:
            await trained(made, last=1)
            await made.save(tmp_path)
            made.checkpointed(1, tmp_path / "state")
            os.kill(await made.pid(0), signal.SIGKILL)
            assert (await take(engine, await made.publish(1))).is_keyframe
            assert (await made.keyframe())[0].digest == digest(held)

    run(check())


@pytest.mark.slow
def test_adapters_are_published_whole(ray_session: Processes, tiny_model: Path, run: RunCoroutine) -> None:
    async def check() -> None:
        chosen = replace(settings(tiny_model, lora={"rank": 4}), weights_key=KEY)
        async with group(1, chosen) as made:
            initial, _ = await made.keyframe()
            assert (initial.version, initial.is_adapter) == (0, True)
            await made.step(batch(1), training_version=0)
            update, payload = await made.publish(1)
            assert (update.base_version, update.is_adapter) == (None, True)
            assert update.num_bytes < update.dense_bytes
            frames = await asyncio.gather(*payload)
            adapter = read_tensors(frames, update=update, sender="the learner", key=KEY)
            assert {name.rpartition(".lora_")[2] for name in adapter} == {"A.weight", "B.weight"}
            assert all(tensor.dtype == torch.bfloat16 for tensor in adapter.values())
            assert digest(adapter) == update.digest
            with pytest.raises(DeltaError, match="its signature does not fit"):
                read_tensors(frames, update=update, sender="the learner", key=b"another")
            assert await made.keyframe() == (update, payload)

    run(check())


def test_dense_versions_and_adapters_are_keyframes_that_need_no_other(ray_session: Processes) -> None:
    publisher = Publisher(key=KEY, dense=True)
    for version in (1, 2):
        tensors = {"a.lora_A.weight": torch.full((64, 8), float(version)).bfloat16()}
        update, refs = publisher.publish(tensors.items(), version=version, adapter_of=10_000)
        assert (update.base_version, update.is_adapter, update.dense_bytes) == (None, True, 10_000)
        assert publisher.keyframe() == (update, refs)
        found = read_tensors(ray.get(refs), update=update, sender="the learner", key=KEY)
        assert digest(found) == digest(tensors) == update.digest
    update, _ = publisher.publish([("w", torch.zeros(64))], version=3)
    assert (update.base_version, update.is_adapter, update.dense_bytes) == (None, False, 256)


def test_a_keyframe_asked_for_during_a_publication_waits_for_it(ray_session: Processes) -> None:
    publisher = Publisher()
    tensors = {"model.layers.0.w": torch.zeros(8), "model.layers.1.w": torch.zeros(8)}
    publisher.seed(tensors.items(), version=0)
    halfway, go_on = threading.Event(), threading.Event()

    def slow() -> Any:
        yield "model.layers.0.w", torch.ones(8)
        halfway.set()
        assert go_on.wait(20)
        yield "model.layers.1.w", torch.ones(8)

    publishing = threading.Thread(target=lambda: publisher.publish(slow(), version=1))
    publishing.start()
    assert halfway.wait(20)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(publisher.keyframe()))
    asking.start()
    asking.join(0.3)
    assert asking.is_alive()
    go_on.set()
    asking.join(20)
    publishing.join(20)
    [(update, refs)] = answers
    assert update.version == 1
    found = read_tensors(ray.get(refs), update=update, sender="the learner")
    assert all(torch.equal(tensor, torch.ones(8)) for tensor in found.values())


def test_a_failed_publication_is_followed_by_a_keyframe(ray_session: Processes) -> None:
    publisher = Publisher()
    tensors = {"a": torch.zeros(8), "b": torch.zeros(8)}
    publisher.seed(tensors.items(), version=0)
    with pytest.raises(ValueError, match="b did not come"):
        publisher.publish([("a", torch.ones(8))], version=1)
    with pytest.raises(RuntimeError, match="no whole version"):
        publisher.keyframe()
    update, refs = publisher.publish(tensors.items(), version=1)
    assert update.is_keyframe
    assert publisher.keyframe() == (update, refs)
