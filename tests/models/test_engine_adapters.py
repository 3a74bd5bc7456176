"""Adapters in a real vLLM on the tiny model: log-probs against merged weights, versions of requests that run."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from contracts.algorithm import LoraConfig
from models import engine_adapters
from models.adapters import adapter_shapes, layer_kinds, save_adapter, skeleton
from models.engine import Engine, WeightsError
from models.engine_adapters import AdapterSettings
from models.engine_files import WEIGHTS_FILE_PREFIX, weights_folder
from models.engine_requests import Generation
from tests.models.test_engine import (
    MAX_LOGPROB_ERROR,
    MEAN_LOGPROB_ERROR,
    PROMPTS,
    LoopThread,
    assert_close,
    greedy,
    reference_logprobs,
    sample,
    until_running,
)
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.slow  # engines with adapters take minutes to answer on two cores

LORA = LoraConfig(rank=4, alpha=8)
MAX_VERSIONS = 3


@dataclass
class Rig:
    """An engine started with the folder of seed 1's adapter, its first answers, and those of one on merged weights."""

    engine: Engine
    run: Any
    folder: Path
    from_merged: list[Generation]
    from_folder: list[Generation]

    def adapter(self, seed: int) -> dict[str, Tensor]:
        return adapter(self.folder / "base", seed)

    def merged(self, seed: int) -> Path:
        return merged(self.folder, seed)


def adapter(base: Path, seed: int) -> dict[str, Tensor]:
    """An adapter that changes log-probs by about 1; seed 0 is the one that changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.15 * (seed > 0)).bfloat16()
        for name, shape in adapter_shapes(skeleton(str(base)), LORA).items()
    }


def saved(folder: Path, seed: int) -> Path:
    kinds = layer_kinds(skeleton(str(folder / "base")), None)
    target = folder / f"adapter-{seed}"
    save_adapter(target, adapter(folder / "base", seed), LORA, kinds, base=str(folder / "base"))
    return target


def merged(folder: Path, seed: int) -> Path:
    """A plain bf16 model folder, merged by PEFT."""
    target = folder / f"merged-{seed}"
    if not target.exists():
        base: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(base, saved(folder, seed)).merge_and_unload()
        model.to(torch.bfloat16).save_pretrained(target)
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("adapters")
    base = build_tiny_model(folder / "base", tied=True)
    thread = LoopThread()

    def start(model: Path, adapters: AdapterSettings | None) -> Engine:
        return thread.run(Engine.start(str(model), max_model_len=256, kv_cache_bytes=1 << 28, adapters=adapters))

    fresh = start(merged(folder, 1), None)
    from_merged = thread.run(greedy(fresh))
    fresh.shutdown()
    engine = start(base, AdapterSettings(LORA, str(saved(folder, 1)), max_versions=MAX_VERSIONS))
    yield Rig(engine, thread.run, folder, from_merged, thread.run(greedy(engine)))
    engine.shutdown()
    assert not adapter_folders()


def adapter_folders() -> list[Path]:
    return list(weights_folder().glob(f"{WEIGHTS_FILE_PREFIX}{os.getpid()}-*"))


async def loaded(engine: Engine) -> set[int]:
    return set(await engine._llm.list_loras())


def test_an_adapter_of_zeros_answers_like_the_base(rig: Rig) -> None:
    rig.run(rig.engine.load_adapter(1, rig.adapter(0), deadline_s=60))
    for prompt, g in zip(PROMPTS, rig.run(greedy(rig.engine)), strict=True):
        expected_T = reference_logprobs(rig.folder / "base", prompt, g.response_tokens, temperature=1)
        assert_close(g.behavior_logprobs, expected_T)
        assert set(g.weights_versions) == {1}


def test_an_adapter_answers_like_merged_weights(rig: Rig) -> None:
    times = rig.run(rig.engine.load_adapter(2, rig.adapter(1), deadline_s=60))
    assert 0 < times.held_s < 60
    assert rig.engine.version == 2
    answers = rig.run(greedy(rig.engine))
    compared = 0
    for prompt, ours, fresh in zip(PROMPTS, answers, rig.from_merged, strict=True):
        expected_T = reference_logprobs(rig.merged(1), prompt, ours.response_tokens, temperature=1)
        assert_close(ours.behavior_logprobs, expected_T)
        base_T = reference_logprobs(rig.folder / "base", prompt, ours.response_tokens, temperature=1)
        assert (expected_T - base_T).abs().mean() > 4 * MEAN_LOGPROB_ERROR
        assert set(ours.weights_versions) == {2}
        # The two engines take the same tokens until bf16 lets one of two near equals win.
        same = 0
        while same < 24 and ours.response_tokens[: same + 1] == fresh.response_tokens[: same + 1]:
            same += 1
        compared += same
        if same:
            error = torch.tensor(ours.behavior_logprobs[:same]) - torch.tensor(fresh.behavior_logprobs[:same])
            assert error.abs().max() < MAX_LOGPROB_ERROR
    assert compared >= 24
    rig.run(rig.engine.check_health())


def test_an_adapter_taken_from_its_folder_at_the_start_gave_the_same_bits(rig: Rig) -> None:
    rig.run(rig.engine.load_adapter(3, rig.adapter(1), deadline_s=60))
    for ours, first in zip(rig.run(greedy(rig.engine)), rig.from_folder, strict=True):
        assert ours.response_tokens == first.response_tokens
        assert ours.behavior_logprobs == first.behavior_logprobs
        assert set(first.weights_versions) == {0}  # what the starter called it


def test_requests_keep_the_adapter_they_began_with(rig: Rig) -> None:
    """Three versions run at once; the arrays are read-only views of the kind that Ray hands out."""
    first = rig.engine.version + 1

    async def overlapping() -> list[list[Generation]]:
        running = []
        for seed in range(3):
            arrays = {name: tensor.view(torch.uint16).numpy() for name, tensor in rig.adapter(seed).items()}
            for array in arrays.values():
                array.setflags(write=False)
            await rig.engine.load_adapter(first + seed, arrays, deadline_s=60)
            running.append(asyncio.ensure_future(sample(rig.engine, 4, max_tokens=200)))
            await until_running(rig.engine, 4 * (seed + 1))
            await asyncio.sleep(0.1)
        assert rig.engine.num_running() >= 8
        assert len(await loaded(rig.engine)) == len(adapter_folders()) == 3
        return [await each for each in running]

    for seed, generations in enumerate(rig.run(overlapping())):
        folder = rig.merged(seed) if seed else rig.folder / "base"
        for prompt, g in zip(PROMPTS, generations, strict=True):
            assert g.weights_versions == [first + seed] * len(g.response_tokens)
            assert_close(g.behavior_logprobs, reference_logprobs(folder, prompt, g.response_tokens, temperature=1))


def test_old_adapters_go_once_nothing_runs_with_them(rig: Rig) -> None:
    version = rig.engine.version
    for number in range(1, 4):
        rig.run(rig.engine.load_adapter(version + number, rig.adapter(number % 2), deadline_s=60))
        assert len(rig.run(loaded(rig.engine))) == len(adapter_folders()) == 1


def test_more_versions_than_there_is_room_for_wait(rig: Rig) -> None:
    """One more version than runs at once: its requests wait, and nothing is mixed up."""
    first = rig.engine.version + 1

    async def crowded() -> list[Generation]:
        running = []
        for number in range(MAX_VERSIONS + 2):
            await rig.engine.load_adapter(first + number, rig.adapter(number % 3), deadline_s=60)
            running.append(asyncio.ensure_future(sample(rig.engine, 1, max_tokens=150)))
            await until_running(rig.engine, number + 1)
        return [(await each)[0] for each in running]

    for number, g in enumerate(rig.run(crowded())):
        folder = rig.merged(number % 3) if number % 3 else rig.folder / "base"
        assert set(g.weights_versions) == {first + number}
        assert_close(g.behavior_logprobs, reference_logprobs(folder, PROMPTS[0], g.response_tokens, temperature=1))
    rig.run(rig.engine.check_health())


A_NAME = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda w: w | {A_NAME: w[A_NAME][:-1]}, id="shape"),
        pytest.param(lambda w: w | {A_NAME: w[A_NAME].float()}, id="dtype"),
        pytest.param(lambda w: w | {"model.up_proj.lora_A.weight": torch.zeros(3)}, id="unknown"),
        pytest.param(lambda w: {k: v for k, v in w.items() if k != A_NAME}, id="missing"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_unharmed(rig: Rig, spoil: Any) -> None:
    before, version = rig.run(greedy(rig.engine)), rig.engine.version
    with pytest.raises(ValueError, match=r"up_proj\.lora_A\.weight"):
        rig.run(rig.engine.load_adapter(version + 1, spoil(rig.adapter(2)), deadline_s=60))
    assert rig.run(greedy(rig.engine)) == before
    assert rig.engine.version == version


def test_a_failure_keeps_the_old_adapter(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version, folders = rig.run(greedy(rig.engine)), rig.engine.version, adapter_folders()

    def torn(folder: Path, *rest: Any, **named: Any) -> None:
        save_adapter(folder, *rest, **named)
        (folder / "adapter_model.safetensors").write_bytes(b"torn")

    with monkeypatch.context() as patch:
        patch.setattr(engine_adapters, "save_adapter", torn)
        with pytest.raises(WeightsError, match=rf"adapter {version + 1} not loaded: .*serving version {version}"):
            rig.run(rig.engine.load_adapter(version + 1, rig.adapter(2), deadline_s=60))
    with pytest.raises(WeightsError, match="did not answer add_lora"):
        rig.run(rig.engine.load_adapter(version + 1, rig.adapter(2), deadline_s=0))
    assert rig.engine.broken is None
    assert adapter_folders() == folders
    assert rig.run(greedy(rig.engine)) == before
    rig.run(rig.engine.load_adapter(version + 1, rig.adapter(2), deadline_s=60))
    rig.run(rig.engine.check_health())


def test_an_update_right_after_cancelled_requests(rig: Rig) -> None:
    async def cancel_and_update() -> None:
        running = asyncio.ensure_future(sample(rig.engine, 4, max_tokens=240))
        await until_running(rig.engine, 4)
        await asyncio.sleep(0.1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        for _ in range(3):
            await rig.engine.load_adapter(rig.engine.version + 1, rig.adapter(1), deadline_s=60)
            await sample(rig.engine, 2, max_tokens=5)

    rig.run(cancel_and_update())
    assert rig.engine.num_running() == 0
    assert len(adapter_folders()) == 1


def test_whole_weights_are_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match="started for adapters"):
        rig.run(rig.engine.load_weights(99, {}, deadline_s=60))
    with pytest.raises(ValueError, match="started for adapters"):
        rig.run(rig.engine.update(99, lambda _: None, deadline_s=60))
    assert rig.engine.shadow_version is None
