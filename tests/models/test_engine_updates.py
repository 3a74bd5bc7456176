"""Updates of a real vLLM on a tiny model: chains of small ones, cached states, lost calls, failures of `write`."""

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import engine_start, engine_update
from models.engine import Engine, UpdateTimes, WeightsError
from models.engine_requests import Generation
from tests.models.test_engine import FAILING_WORKER, LoopThread, greedy, never, sample, until_running
from tests.tiny import build_tiny_model

NUM_CHANGES = 12
# Longer than a block of cached states, which is 128 tokens on CPU.
LONG_PROMPT = [3 + i * 7 % 300 for i in range(180)]


@dataclass
class Rig:
    """An engine, and what engines say that were started with its weights after 0 and NUM_CHANGES changes."""

    engine: Engine
    run: Any
    weights: list[dict[str, Tensor]]
    answers: list[list[Generation]]
    long_answers: list[Generation]

    def load(self, index: int, **settings: Any) -> UpdateTimes:
        return self.run(self.engine.update(self.engine.version + 1, writer(self.weights[index]), **settings))


def change(tensors: Mapping[str, Tensor], number: int) -> None:
    """A small step in place, as a delta has it: a thirtieth of the values moves."""
    for index, (_, tensor) in enumerate(sorted(tensors.items())):
        generator = torch.Generator().manual_seed(1000 * number + index)
        moved = torch.rand(tensor.shape, generator=generator) < 0.03
        tensor[moved] += (torch.randn(int(moved.sum()), generator=generator) * 0.2).to(tensor.dtype)


def writer(weights: Mapping[str, Tensor]) -> Any:
    def write(shadow: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            shadow[name].copy_(tensor)

    return write


def damage(shadow: Mapping[str, Tensor]) -> None:
    shadow["model.norm.weight"].fill_(9)
    raise KeyError("a bad delta")


async def answer(engine: Engine, prompt: list[int] = LONG_PROMPT) -> Generation:
    return await engine.generate(prompt, request_id="long", max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    first = build_tiny_model(tmp_path_factory.mktemp("updates") / "first", tied=True)
    last = build_tiny_model(first.parent / "last", tied=True)
    weights = [load_file(first / "model.safetensors"), load_file(first / "model.safetensors")]
    for number in range(NUM_CHANGES):
        change(weights[1], number)
    save_file(weights[1], last / "model.safetensors", metadata={"format": "pt"})
    thread = LoopThread()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_start, "WORKER", FAILING_WORKER)
        start = [Engine.start(str(f), max_model_len=256, kv_cache_bytes=1 << 28) for f in (first, last)]
        engines = [thread.run(engine) for engine in start]
    answers = [thread.run(greedy(engine)) for engine in engines]
    long_answers = [thread.run(answer(engine)) for engine in engines]
    engines[1].shutdown()
    yield Rig(engines[0], thread.run, weights, answers, long_answers)
    engines[0].shutdown()


def logprobs(generations: list[Generation]) -> list[list[float]]:
    return [generation.behavior_logprobs for generation in generations]


def test_a_chain_of_small_updates_ends_where_a_fresh_engine_starts(rig: Rig) -> None:
    views = {name: tensor.data_ptr() for name, tensor in rig.engine.shadow_tensors.items()}

    async def update_while_running() -> list[Generation]:
        running = asyncio.ensure_future(sample(rig.engine, 4, max_tokens=240))
        for number in range(NUM_CHANGES):
            step = partial(change, number=number)
            await rig.engine.update(number + 1, step, deadline_s=60, clear_cache=number % 2 == 0)
        return await running

    responses = rig.run(update_while_running())
    assert {v for response in responses for v in response.weights_versions} - {0}
    assert rig.engine.version == rig.engine.shadow_version == NUM_CHANGES
    found = rig.run(greedy(rig.engine))
    assert logprobs(found) == logprobs(rig.answers[1]) != logprobs(rig.answers[0])
    assert {v for response in found for v in response.weights_versions} == {NUM_CHANGES}
    assert {name: tensor.data_ptr() for name, tensor in rig.engine.shadow_tensors.items()} == views


@pytest.mark.parametrize("clear_cache", [True, False])
def test_a_cached_prompt_is_not_met_by_newer_weights(rig: Rig, clear_cache: bool) -> None:
    block_tokens = rig.engine._llm.vllm_config.cache_config.block_size
    assert block_tokens is not None
    assert block_tokens < len(LONG_PROMPT)
    for index in (0, 1, 0, 1):
        rig.load(index, deadline_s=60, clear_cache=clear_cache)
        # The second time its states are cached.
        for _ in range(2):
            found = rig.run(answer(rig.engine))
            assert found.behavior_logprobs == pytest.approx(rig.long_answers[index].behavior_logprobs, abs=0.02)
    assert rig.long_answers[0].behavior_logprobs != pytest.approx(rig.long_answers[1].behavior_logprobs, abs=0.2)


def test_generation_goes_on_while_an_update_is_written(rig: Rig) -> None:
    written = threading.Event()

    async def generate_meanwhile() -> UpdateTimes:
        update = asyncio.ensure_future(
            rig.engine.update(rig.engine.version + 1, lambda _: written.wait(60), deadline_s=60)
        )
        await asyncio.sleep(0)
        await answer(rig.engine)
        assert not update.done()
        assert rig.engine.shadow_version is None
        written.set()
        return await update

    times = rig.run(generate_meanwhile())
    assert min(times.write_s, times.pause_s, times.load_s, times.resume_s) > 0
    assert times.held_s == times.pause_s + times.load_s + times.resume_s


def test_what_write_raises_passes_through_and_harms_nothing(rig: Rig) -> None:
    rig.load(0, deadline_s=60)
    version = rig.engine.version
    with pytest.raises(KeyError, match="a bad delta"):
        rig.run(rig.engine.update(version + 1, damage, deadline_s=60))
    assert (rig.engine.version, rig.engine.shadow_version) == (version, None)
    assert logprobs(rig.run(greedy(rig.engine))) == logprobs(rig.answers[0])
    rig.run(rig.engine.check_health())
    rig.load(1, deadline_s=60)
    assert rig.engine.shadow_version == rig.engine.version == version + 1
    assert logprobs(rig.run(greedy(rig.engine))) == logprobs(rig.answers[1])


def test_a_late_write_is_loaded_by_the_next_update(rig: Rig) -> None:
    rig.load(0, deadline_s=60)
    version = rig.engine.version

    def write_late(shadow: Mapping[str, Tensor]) -> None:
        writer(rig.weights[1])(shadow)
        time.sleep(0.3)

    with pytest.raises(WeightsError, match=f"after the deadline.*still serving version {version}"):
        rig.run(rig.engine.update(version + 1, write_late, deadline_s=0.2))
    assert (rig.engine.version, rig.engine.shadow_version) == (version, version + 1)
    assert logprobs(rig.run(greedy(rig.engine))) == logprobs(rig.answers[0])
    rig.run(rig.engine.update(version + 1, lambda _: None, deadline_s=60))
    assert logprobs(rig.run(greedy(rig.engine))) == logprobs(rig.answers[1])


@pytest.mark.parametrize("call", ["start_weight_update", "update_weights", "finish_weight_update", "resume_generation"])
def test_a_lost_call_does_not_leave_the_engine_paused(rig: Rig, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Requests go on after the deadline, and their tokens name the weights that the workers hold."""
    rig.load(0, deadline_s=60)
    version = rig.engine.version
    real_call = getattr(rig.engine._llm, call)
    lost: list[str] = []

    async def lose_the_first(*args: Any, **named: Any) -> Any:
        if lost:
            return await real_call(*args, **named)
        lost.append(call)
        return await never()

    async def update_while_running() -> tuple[Any, list[Generation], float]:
        running = asyncio.ensure_future(sample(rig.engine, 2, max_tokens=150))
        await until_running(rig.engine, 2)
        monkeypatch.setattr(rig.engine._llm, call, lose_the_first)
        began = time.monotonic()
        update = rig.engine.update(version + 1, writer(rig.weights[1]), deadline_s=1.5)
        outcome = (await asyncio.gather(update, return_exceptions=True))[0]
        return outcome, await running, time.monotonic() - began

    outcome, responses, seconds = rig.run(update_while_running())
    held = version + (call in ("finish_weight_update", "resume_generation"))
    assert isinstance(outcome, UpdateTimes if held > version else WeightsError), outcome
    assert lost
    assert seconds < 15
    assert rig.engine.broken is None
    assert rig.engine.version == held
    assert {response.weights_versions[-1] for response in responses} == {held}
    found = rig.run(greedy(rig.engine))
    assert logprobs(found) == logprobs(rig.answers[held - version])
    assert {v for response in found for v in response.weights_versions} == {held}
    rig.load(0, deadline_s=60)
    rig.run(rig.engine.check_health())


def test_an_answer_after_the_deadline_counts(rig: Rig) -> None:
    rig.load(0, deadline_s=60)
    rig.run(rig.engine._llm.collective_rpc("slow_next_load", args=(1.5,)))
    rig.load(1, deadline_s=1)
    rig.run(rig.engine.check_health())
    assert logprobs(rig.run(greedy(rig.engine))) == logprobs(rig.answers[1])


@pytest.mark.parametrize("cancelled", ["caller", "update"])
def test_cancelling_an_update_does_not_leave_the_engine_paused(rig: Rig, cancelled: str) -> None:
    rig.load(0, deadline_s=60)
    version = rig.engine.version

    async def cancel_while_loading() -> list[Generation]:
        await rig.engine._llm.collective_rpc("slow_next_load", args=(1.0,))
        caller = asyncio.ensure_future(rig.engine.update(version + 1, writer(rig.weights[1]), deadline_s=60))
        while rig.engine._accepting.is_set():  # noqa: ASYNC110 nothing to wait for but the pause itself
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        for task in [caller] if cancelled == "caller" else rig.engine._updating:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        # Waits for the update's end like any other request.
        return await greedy(rig.engine)

    found = rig.run(cancel_while_loading())
    assert logprobs(found) == logprobs(rig.answers[1])
    assert {v for response in found for v in response.weights_versions} == {version + 1}
    rig.run(rig.engine.check_health())


def test_an_engine_that_never_resumes_is_broken(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last: it is broken then."""
    monkeypatch.setattr(engine_update, "RECOVERY_S", 1.0)

    async def update_while_running() -> list[Any]:
        running = asyncio.ensure_future(sample(rig.engine, 2, max_tokens=150))
        await until_running(rig.engine, 2)
        monkeypatch.setattr(rig.engine._llm, "resume_generation", never)
        update = rig.engine.update(rig.engine.version + 1, lambda _: None, deadline_s=1)
        return list(await asyncio.gather(running, update, return_exceptions=True))

    outcomes = rig.run(update_while_running(), timeout_s=30)
    assert [type(outcome) for outcome in outcomes] == [WeightsError] * 2
    assert "resume_generation" in str(rig.engine.broken)
    with pytest.raises(WeightsError, match="broken"):
        rig.run(greedy(rig.engine))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_updates_on_a_gpu_answer_like_a_fresh_engine(tmp_path: Path) -> None:
    folders = [build_tiny_model(tmp_path / f"seed-{seed}", tied=True, seed=seed) for seed in (0, 1)]
    thread = LoopThread()
    start = {"max_model_len": 256, "num_gpus": 1, "gpu_memory_utilization": 0.2}
    engine, fresh = (thread.run(Engine.start(str(f), **start), timeout_s=600) for f in folders)  # type: ignore[arg-type]
    weights = load_file(folders[1] / "model.safetensors")
    before = thread.run(greedy(engine))
    thread.run(engine.update(1, writer(weights), deadline_s=60))
    found, expected = thread.run(greedy(engine)), thread.run(greedy(fresh))
    engine.shutdown()
    fresh.shutdown()
    assert logprobs(found) == logprobs(expected) != logprobs(before)
