"""A replica under a real Ray Serve with a real engine: answers, their versions, new weights while requests run."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from safetensors.torch import load_file

from contracts.records import WeightsUpdate
from contracts.serving import EngineReplicaConfig, ServingConfig, ServingLimits
from models.weight_stream import DeltaSender
from serving.records import LIVE, Head, Order, PolicyRequest, StartWeights
from serving.replica import PolicyReplica, ReplicaSettings
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.tiny import build_tiny_model

APP = "headrace-serving-replica-test"
CHAT = [{"role": "user", "content": "What is a headrace?"}]
LONG = 230  # tokens; the context has 256
MOST = 235


class ScriptedKeeper:
    """Gives one replica the orders that a test wrote."""

    def __init__(self, first: list[Order]) -> None:
        self._orders = first
        self._news = asyncio.Event()
        self._outcomes: list[tuple[int, str]] = []
        self._told = asyncio.Event()
        self._polls: list[tuple[int, bool]] = []

    async def order(
        self, slot: str, replica: str, version: int | None, running: int, wait_s: float, *, starting: bool = False
    ) -> Order | None:
        assert slot == LIVE
        self._polls.append((running, starting))
        self._news.clear()
        if not self._orders:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
        return self._orders.pop(0) if self._orders else None

    async def served(self, slot: str, replica: str, version: int, error: str = "") -> None:
        self._outcomes.append((version, error))
        self._told.set()

    async def leave(self, slot: str, replica: str) -> None:
        pass

    async def give(self, order: Order, wait_s: float = 60.0) -> tuple[int, str]:
        """What the replica says to this order."""
        self._told.clear()
        self._orders.append(order)
        self._news.set()
        async with asyncio.timeout(wait_s):
            await self._told.wait()
        return self._outcomes[-1]

    async def seen(self) -> tuple[list[tuple[int, bool]], list[tuple[int, str]]]:
        return self._polls, self._outcomes


@dataclass
class Spoken:
    """What a replica said to one request: the head, and the JSON objects after it."""

    head: Head
    objects: list[dict[str, Any]]
    done: bool

    @property
    def text(self) -> str:
        choices = [choice for part in self.objects for choice in part["choices"]]
        return "".join((choice.get("delta") or choice.get("message"))["content"] or "" for choice in choices)

    @property
    def versions(self) -> set[int]:
        return {part["weights_version"] for part in self.objects}


class Rig:
    """The application, and the weights of versions 0, 1 (both of seed 0) and 2 (of seed 1)."""

    def __init__(self, folders: list[Path], run: RunCoroutine, *, application: str = APP, **serving: Any) -> None:
        self.run = run
        # Every test begins with version 1 and leaves it so.
        self.sender = DeltaSender()
        self.weights = [load_file(folder / "model.safetensors") for folder in folders]
        self.to_1 = self._update(0, 1)
        self.to_2 = self._update(1, 2)
        keeper: Any = serve.deployment(ScriptedKeeper, name="versions", ray_actor_options={"num_cpus": 0})
        replica: Any = serve.deployment(
            PolicyReplica,
            name="live",
            max_ongoing_requests=64,
            ray_actor_options={"num_cpus": 0.1},
            health_check_period_s=1.0,
            graceful_shutdown_timeout_s=20.0,
        )
        limits = ServingLimits(max_response_tokens=MOST)
        config = ServingConfig(replicas=EngineReplicaConfig(kv_cache_gib=0.1), drain_s=60.0, limits=limits, **serving)
        settings = ReplicaSettings(LIVE, "policy", StartWeights(str(folders[0]), 0), 256, config, start_s=120.0)
        bound = keeper.bind([self.order(self.to_1)])
        serve.run(replica.bind(settings, bound), name=application, route_prefix=None)
        self.live = serve.get_deployment_handle("live", application).options(stream=True)
        self.keeper = serve.get_deployment_handle("versions", application)

    def _update(self, seed: int, version: int) -> tuple[WeightsUpdate, list[ray.ObjectRef]]:
        frames = [bytes(frame) for frame in self.sender.encode(self.weights[seed].items(), version)]
        update = WeightsUpdate(
            version,
            None if version == 1 else version - 1,
            sum(map(len, frames)),
            self.sender.digest,
            self.sender.dense_bytes,
            num_frames=len(frames),
            fingerprint=self.sender.fingerprint,
        )
        return update, [ray.put(frame) for frame in frames]

    def order(self, *steps: tuple[WeightsUpdate, list[ray.ObjectRef]], alone: bool = True) -> Order:
        return Order(steps[-1][0].version, list(steps), deadline_s=120.0, alone=alone)

    async def give(self, order: Order) -> tuple[int, str]:
        outcome: tuple[int, str] = await self.keeper.give.remote(order)
        return outcome

    async def ask(self, body: dict[str, Any], *, deadline_s: float = 60.0, answer_id: str = "answer-1") -> Spoken:
        parts = [part async for part in self.stream(body, deadline_s=deadline_s, answer_id=answer_id)]
        head, text = parts[0], b"".join(parts[1:]).decode()
        assert isinstance(head, Head)
        if not body.get("stream"):
            return Spoken(head, [json.loads(text)] if text else [], done=bool(text))
        events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
        done = events[-1:] == ["[DONE]"]
        return Spoken(head, [json.loads(event) for event in events[: len(events) - done]], done)

    async def stream(
        self, body: dict[str, Any], *, deadline_s: float = 60.0, answer_id: str = "answer-1"
    ) -> AsyncGenerator[Any]:
        kind: Any = "chat" if "messages" in body else "completion"
        response: Any = self.live.answer.remote(PolicyRequest(kind, body, answer_id, deadline_s))
        try:
            async for part in response:
                yield part
        finally:
            response.cancel()


@pytest.fixture(scope="module")
def rig(ray_session: Processes, tmp_path_factory: pytest.TempPathFactory, run: RunCoroutine) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("served")
    yield Rig([build_tiny_model(folder / f"seed-{seed}", tied=True, seed=seed) for seed in (0, 1)], run)
    serve.delete(APP)


def chat(**settings: Any) -> dict[str, Any]:
    return {"messages": CHAT, "seed": 5, "max_tokens": 16, "ignore_eos": True, **settings}


def test_it_takes_requests_only_at_the_version_that_it_is_told_at_its_start(rig: Rig) -> None:
    assert rig.run(rig.ask(chat())).head.version == 1
    polls, outcomes = rig.run(_call(rig.keeper.seen))
    assert polls[:2] == [(0, True), (0, True)]
    assert outcomes[0] == (1, "")


def test_a_streamed_answer_is_the_whole_one_in_parts(rig: Rig) -> None:
    async def both() -> tuple[Spoken, Spoken]:
        options = {"stream_options": {"include_usage": True}}
        return await rig.ask(chat(stream=True, **options)), await rig.ask(chat(), answer_id='odd "id')

    streamed, whole = rig.run(both())
    assert (streamed.head.status, streamed.head.draining, streamed.done) == (200, False, True)
    assert len(streamed.objects) > 10
    assert {part["id"] for part in streamed.objects} == {"answer-1"}
    assert {part["model"] for part in streamed.objects} == {"policy"}
    assert streamed.versions == whole.versions == {1}
    (document,) = whole.objects
    assert document["id"] == 'odd "id'
    assert streamed.text == document["choices"][0]["message"]["content"]
    assert len(streamed.text) > 10
    usage = streamed.objects[-1]["usage"]
    assert usage["completion_tokens"] == 16
    assert usage.items() <= document["usage"].items()


def test_an_answer_without_a_limit_has_that_of_the_configuration_or_what_fits(rig: Rig) -> None:
    short, long = (
        rig.run(rig.ask({"messages": [{"role": "user", "content": text}], "ignore_eos": True})).objects[0]["usage"]
        for text in ("A", "A" * 100)
    )
    assert short["completion_tokens"] == MOST
    assert long["prompt_tokens"] > 256 - MOST
    assert long["total_tokens"] == 256
    completion = rig.run(rig.ask({"prompt": "A", "ignore_eos": True})).objects[0]["usage"]
    assert completion["completion_tokens"] == 16  # the API's own default


def test_completions_with_choices_seeds_and_logprobs(rig: Rig) -> None:
    body = {"prompt": "The miller opened", "max_tokens": 6, "n": 2, "seed": 3, "logprobs": 2, "temperature": 1.0}
    first, again = rig.run(rig.ask(body)).objects[0], rig.run(rig.ask(body)).objects[0]
    assert (first["object"], first["weights_version"]) == ("text_completion", 1)
    assert [choice["text"] for choice in first["choices"]] == [choice["text"] for choice in again["choices"]]
    assert first["choices"][0]["text"] != first["choices"][1]["text"]
    assert len(first["choices"][0]["logprobs"]["token_logprobs"]) == 6


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": "mill " * 400, "max_tokens": 5}, "256"),
        ({"prompt": "mill " * 400, "max_tokens": 5, "stream": True}, "256"),
        ({"prompt": [], "max_tokens": 5}, "prompt"),
        ({"prompt": "a", "max_tokens": 5, "temperature": -1}, "temperature"),
        ({"prompt": "a", "max_tokens": 5, "logprobs": 10_000}, "logprobs"),
        ({"prompt": "a", "max_tokens": 5, "logprobs": 10_000, "stream": True}, "logprobs"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": "mill " * 400}]}, "256"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_the_model_cannot_take_is_refused_in_the_openai_shape(rig: Rig, body: dict[str, Any], says: str) -> None:
    spoken = rig.run(rig.ask(body))
    assert (spoken.head.status, spoken.objects) == (400, [])
    assert spoken.head.error is not None
    assert set(spoken.head.error) == {"message", "type", "param", "code"}
    assert spoken.head.error["type"] == "invalid_request_error"
    assert says in spoken.head.error["message"]


def test_an_answer_that_takes_too_long_ends_with_what_it_has(rig: Rig) -> None:
    spoken = rig.run(rig.ask(chat(stream=True, max_tokens=LONG), deadline_s=0.4))
    assert spoken.done
    assert spoken.objects[-1]["choices"][0]["finish_reason"] == "abort"
    assert 1 < len(spoken.objects) < LONG
    late = rig.run(rig.ask(chat(max_tokens=LONG), deadline_s=0.2))
    assert late.head.status == 503
    assert late.head.error is not None
    assert "0.2 s" in late.head.error["message"]


def test_each_answer_is_of_one_version_while_others_arrive(rig: Rig) -> None:
    async def scenario() -> tuple[list[Spoken], list[Any], str, str, str]:
        before = (await rig.ask(chat())).text
        stop = asyncio.Event()
        spoken: list[Spoken] = []

        async def keep_asking(number: int) -> None:
            while not stop.is_set():
                body = chat(stream=number % 2 == 0, seed=number)
                spoken.append(await rig.ask(body, answer_id=f"answer-{number}"))

        asking = [asyncio.create_task(keep_asking(number)) for number in range(6)]
        await asyncio.sleep(0.5)
        outcomes = [await rig.give(rig.order(rig.to_2))]
        during = (await rig.ask(chat())).text
        await asyncio.sleep(0.3)
        outcomes.append(await rig.give(rig.order(rig.to_1)))  # back, by a keyframe
        await asyncio.sleep(0.3)
        stop.set()
        await asyncio.gather(*asking)
        return spoken, outcomes, before, during, (await rig.ask(chat())).text

    spoken, outcomes, before, during, after = rig.run(scenario())
    assert outcomes == [(2, ""), (1, "")]
    assert all(each.head.status == 200 and each.done for each in spoken)
    assert all(each.versions == {each.head.version} for each in spoken)
    assert {each.head.version for each in spoken} == {1, 2}
    assert before == after != during


def test_a_draining_replica_that_is_not_alone_sends_requests_elsewhere(rig: Rig) -> None:
    async def scenario() -> tuple[Spoken, list[Spoken], tuple[int, str], Spoken]:
        long = asyncio.create_task(rig.ask(chat(stream=True, max_tokens=LONG)))
        await asyncio.sleep(0.1)
        giving = asyncio.ensure_future(_call(rig.keeper.give, rig.order(rig.to_2, alone=False)))
        asked: list[Any] = []
        while not giving.done() and not (asked and asked[-1].head.draining):
            asked.append(await rig.ask(chat(max_tokens=1)))
        outcome = await giving
        return await long, asked, outcome, await rig.ask(chat())

    long, asked, outcome, after = rig.run(scenario())
    assert asked[-1].head.draining
    assert asked[-1].objects == []
    assert long.versions == {1}
    assert long.objects[-1]["choices"][0]["finish_reason"] == "length"
    assert outcome == (2, "")
    assert after.versions == {2}
    assert rig.run(rig.give(rig.order(rig.to_1))) == (1, "")


def test_a_cancelled_request_frees_its_place(rig: Rig) -> None:
    """The next exchange would wait for it to finish."""

    async def scenario() -> tuple[int, float]:
        streams = [rig.stream(chat(stream=True, max_tokens=LONG)) for _ in range(16)]
        for stream in streams:
            assert (await anext(stream)).status == 200
            await stream.aclose()
        began = asyncio.get_running_loop().time()
        outcome = await rig.give(rig.order(rig.to_1))
        return outcome[0], asyncio.get_running_loop().time() - began

    version, took_s = rig.run(scenario())
    assert version == 1
    assert took_s < 10


def test_orders_that_do_not_fit_are_refused_and_it_serves_on(rig: Rig) -> None:
    before = rig.run(rig.ask(chat())).text
    broken = (rig.to_2[0], [*rig.to_2[1][:-1], ray.put(b"not a frame")])
    version, error = rig.run(rig.give(rig.order(broken)))
    assert version == 1
    assert error.startswith("weights version 2 from the version keeper refused: ")
    assert rig.run(rig.ask(chat())).text == before
    assert rig.run(rig.give(rig.order(rig.to_1, rig.to_2))) == (2, "")
    assert rig.run(rig.give(rig.order(rig.to_1))) == (1, "")
    assert rig.run(rig.ask(chat())).text == before


async def _call(method: Any, *arguments: Any) -> Any:
    return await method.remote(*arguments)
