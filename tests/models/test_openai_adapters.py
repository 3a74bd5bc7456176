"""vLLM's OpenAI handlers on an engine with adapters: each answer is of the adapter that it began with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.engine import Engine
from models.engine_adapters import AdapterSettings
from models.engine_scoring import response_logprobs
from models.openai import OpenAIHandlers
from tests.models.test_engine import PROMPTS, LoopThread, assert_close
from tests.models.test_engine_adapters import LORA, adapter
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.slow  # engines with adapters take minutes to answer on two cores

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "ignore_eos": True}
SHORT, LONG = 10, 60


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("adapters") / "base", tied=True)


@pytest.fixture(scope="module")
def served(base: Path) -> Iterator[tuple[Engine, Any]]:
    thread = LoopThread()
    start = Engine.start(
        str(base), max_model_len=256, kv_cache_bytes=1 << 28, adapters=AdapterSettings(LORA, max_versions=3)
    )
    engine = thread.run(start, timeout_s=600)
    yield engine, thread.run
    engine.shutdown()


def test_an_answer_keeps_its_adapter_and_the_next_has_the_new_one(base: Path, served: tuple[Engine, Any]) -> None:
    engine, run = served
    handlers = OpenAIHandlers(engine, "policy", most_tokens=200)

    async def whole(name: str) -> tuple[int, str]:
        answered = await handlers.answer("chat", CHAT | {"max_tokens": SHORT}, answer_id=name)
        document = json.loads(b"".join([part async for part in answered.parts]))
        assert document["weights_version"] == answered.version
        assert "weights_versions" not in document
        return answered.version, document["choices"][0]["message"]["content"]

    async def check() -> None:
        first = await whole("first")
        assert first[0] == 0
        long = await handlers.answer("chat", CHAT | {"max_tokens": LONG, "stream": True}, answer_id="long")
        parts = [await anext(long.parts) for _ in range(3)]
        await engine.load_adapter(1, adapter(base, 1), deadline_s=120)
        second = await whole("second")
        assert second[0] == 1
        assert second[1] != first[1]
        parts += [part async for part in long.parts]
        *events, done = b"".join(parts).decode().split("\n\n")[:-1]
        assert done == "data: [DONE]"
        said = [json.loads(event.removeprefix("data: ")) for event in events]
        assert {event["weights_version"] for event in said} == {long.version} == {0}
        assert not any("weights_versions" in event for event in said)
        text = "".join(choice["delta"].get("content") or "" for event in said for choice in event["choices"])
        assert text.startswith(first[1])  # greedy, and of the same adapter
        assert said[-1]["choices"][0]["finish_reason"] == "length"
        await engine.load_adapter(0, adapter(base, 0), deadline_s=120)  # as after a rollback
        assert await whole("again") == first

    run(check(), timeout_s=400)


def test_responses_are_scored_under_the_newest_adapter(base: Path, served: tuple[Engine, Any]) -> None:
    engine, run = served

    async def check() -> None:
        await engine.load_adapter(2, adapter(base, 1), deadline_s=120)
        sampled = await engine.generate(PROMPTS[0], request_id="sampled", max_tokens=SHORT, temperature=1.0, seed=1)
        scored = await response_logprobs(engine, PROMPTS[0], sampled.response_tokens, request_id="scored")
        assert_close(sampled.behavior_logprobs, torch.tensor(scored))
        await engine.load_adapter(3, adapter(base, 0), deadline_s=120)
        other = await response_logprobs(engine, PROMPTS[0], sampled.response_tokens, request_id="other")
        apart = [abs(one - another) for one, another in zip(scored, other, strict=True)]
        assert sum(apart) / len(apart) > 0.2

    run(check(), timeout_s=400)
