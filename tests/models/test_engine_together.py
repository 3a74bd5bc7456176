"""A repeatable engine: the same requests give the same bits, whatever it did before and however slowly they come.

The last bits of a tiny model do not depend on the batch (those of a large one do), so that the batches are watched too.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models import engine_together
from models.engine import Engine
from models.engine_requests import Generation, SamplingRequest
from tests.conftest import RunCoroutine


@pytest.fixture(scope="module")
def engine(tiny_model: Path, run: RunCoroutine) -> Iterator[Engine]:
    async def start() -> Engine:
        return await Engine.start(
            str(tiny_model),
            dtype="float32",
            max_model_len=256,
            max_num_seqs=8,
            kv_cache_bytes=1 << 27,
            threads=1,
            repeatable=True,
        )

    engine = run(start())
    yield engine
    engine.shutdown()


def requests(num: int = 12) -> list[SamplingRequest]:
    """More than run at once, of several lengths, some of the same prompt."""
    return [
        SamplingRequest(f"r{i}", [1, 40 + i // 2, 7, 99, *range(30, 31 + i // 2)], 20 + 3 * i, 1.0, seed=i)
        for i in range(num)
    ]


async def one_by_one(engine: Engine, asked: list[SamplingRequest], wait_s: float) -> list[Generation]:
    """As a run that is not deterministic asks: each when it comes."""

    async def later(request: SamplingRequest, after_s: float) -> Generation:
        await asyncio.sleep(after_s)
        settings: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": 1.0, "seed": request.seed}
        return await engine.generate(request.prompt_tokens, request_id=request.request_id, **settings)

    return list(await asyncio.gather(*(later(request, wait_s * number) for number, request in enumerate(asked))))


@pytest.fixture
def batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Which requests got a token in each step of the engine core."""
    processor: Any = engine._llm.output_processor
    process, seen = processor.process_outputs, []

    def watched(outputs: list[Any], *others: Any, **more: Any) -> Any:
        if outputs:
            seen.append(tuple(each.request_id.split("-")[0] for each in outputs))
        return process(outputs, *others, **more)

    monkeypatch.setattr(processor, "process_outputs", watched)
    return seen


async def together(engine: Engine, asked: list[SamplingRequest]) -> list[Generation | ValueError]:
    return await engine.generate_together(asked, deadline_s=60)


def test_the_same_requests_give_the_same_bits(
    engine: Engine, run: RunCoroutine, monkeypatch: pytest.MonkeyPatch, batches: list[tuple[str, ...]]
) -> None:
    def seen() -> list[tuple[str, ...]]:
        copy = list(batches)
        batches.clear()
        return copy

    first, first_batches = run(together(engine, requests())), seen()
    assert first_batches[0] == tuple(f"r{i}" for i in range(8))
    assert all(isinstance(each, Generation) and len(each.response_tokens) > 1 for each in first)
    # Another past: other requests were finished, cached and freed in between.
    run(one_by_one(engine, requests()[::-1], 0.01))
    staggered_batches = seen()
    again, again_batches = run(together(engine, requests())), seen()
    answer = engine_together.answer

    async def slowly(llm: Any, awaitable: Any, call: str, expires: float) -> Any:
        if call == "add_request":
            await asyncio.sleep(0.02)  # longer than a step of the engine
        return await answer(llm, awaitable, call, expires)

    monkeypatch.setattr(engine_together, "answer", slowly)
    slow, slow_batches = run(together(engine, requests())), seen()
    assert again == slow == first
    assert again_batches == slow_batches == first_batches
    assert staggered_batches != first_batches


def test_a_prompt_that_is_refused_leaves_the_others(engine: Engine, run: RunCoroutine) -> None:
    good = requests(4)
    bad = SamplingRequest("too-long", [5] * 400, 10, 1.0, seed=1)
    *found, refused = run(together(engine, [*good, bad]))
    assert isinstance(refused, ValueError)
    assert found == run(together(engine, good))


def test_a_share_that_is_given_up_leaves_nothing_behind(engine: Engine, run: RunCoroutine) -> None:
    """The next one finds the engine idle, and gets the bits that it would have got."""

    async def give_up() -> None:
        share = asyncio.ensure_future(together(engine, requests()))
        while not engine.num_running():  # noqa: ASYNC110 nothing to wait for but the count itself
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="other requests run"):
            await together(engine, requests(1))
        share.cancel()
        with pytest.raises(asyncio.CancelledError):
            await share

    first = run(together(engine, requests()))
    run(give_up())
    assert engine.num_running() == 0
    assert engine.broken is None
    assert run(together(engine, requests())) == first
