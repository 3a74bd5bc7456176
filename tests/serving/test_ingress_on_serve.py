"""The ingress as a Ray Serve application over HTTP, with the official client: replicas die, drain and fall silent."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from contracts.serving import ServingConfig
from serving.asking import FAILED, Replicas, pass_http_proxies_by
from serving.ingress import Ingress
from serving.limits import Admission
from serving.meters import Meters
from serving.protocol import ApiError
from serving.records import PolicyRequest
from serving.wire import Inbox
from tests.conftest import RunCoroutine
from tests.head import free_ports
from tests.serving.scripted import WORDS, ScriptedKeeper, ScriptedReplica, times

NAME = "headrace-serving-scripted"
ANSWER = "".join(WORDS)
SMALL = {"num_cpus": 0.01}


@dataclass
class Served:
    url: str
    folder: Path
    client: openai.OpenAI

    def chat(self, text: str, **more: object) -> object:
        return self.client.chat.completions.create(  # type: ignore[call-overload]
            model="policy", messages=[{"role": "user", "content": text}], **more
        )

    def inside(self) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        return float(text.split("\nheadrace_serving_inside ")[1].split()[0])


@pytest.fixture(scope="module")
def served(ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("scripted")
    config = ServingConfig.model_validate({"request_s": 30, "first_token_retries": 2, "replicas": {"max_replicas": 2}})
    checks = {"health_check_period_s": 0.5, "health_check_timeout_s": 5, "graceful_shutdown_timeout_s": 1}
    replica: Any = serve.deployment(ScriptedReplica)
    live = replica.options(
        name="live", num_replicas=2, max_ongoing_requests=16, ray_actor_options=SMALL, **checks
    ).bind(folder)
    pinned = replica.options(name="pinned-3", ray_actor_options=SMALL, **checks).bind(folder, 3)
    keepers: Any = serve.deployment(ScriptedKeeper)
    doors: Any = serve.deployment(Ingress)
    keeper = keepers.options(name="versions", ray_actor_options=SMALL).bind(2)
    door = doors.options(name="ingress", max_ongoing_requests=10_000, ray_actor_options=SMALL)
    (port,) = free_ports(1)
    app = door.bind(config.model_copy(update={"port": port}), folder, live, keeper, {3: pinned}, listens=True)
    serve.run(app, name=NAME, route_prefix=None)
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=40)
    yield Served(url, folder, client)
    serve.delete(NAME)


def until(condition: object, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it has not become true"
        time.sleep(0.05)


def test_the_official_client(served: Served) -> None:
    raw = served.client.chat.completions.with_raw_response.create(
        model="policy", messages=[{"role": "user", "content": "hello"}], n=2
    )
    assert raw.headers["x-weights-version"] == "7"
    answer = raw.parse()
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(WORDS)
    text = served.client.completions.create(model="policy@3", prompt="hello")
    assert (text.choices[0].text, text.model_extra) == (ANSWER, {"weights_version": 3})
    assert [model.id for model in served.client.models.list()] == ["policy", "policy@3"]
    with pytest.raises(openai.NotFoundError, match="policy@3"):
        served.client.completions.create(model="policy@4", prompt="hello")
    with pytest.raises(openai.BadRequestError, match="allowed are 1 to 1024"):
        served.chat("hello", max_tokens=5000)


def test_a_stream_comes_token_by_token(served: Served) -> None:
    by_wire = times(served.folder, "by-wire")
    began = time.monotonic()
    came = [(chunk, time.monotonic() - began) for chunk in served.chat("hello", stream=True)]  # type: ignore[attr-defined]
    assert [chunk.choices[0].delta.content for chunk, _ in came] == WORDS
    assert len({chunk.id for chunk, _ in came}) == 1
    assert times(served.folder, "by-wire") == by_wire + 1
    assert came[-1][1] - came[0][1] > 0.05  # not all at the end
    counted = list(served.chat("hello", stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert counted[-1].usage.completion_tokens == len(WORDS)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("act", ["die-once", "die-after-head-once", "fail-once", "drain-once"])
def test_a_request_whose_replica_dies_before_its_first_token_is_answered(
    served: Served, act: str, stream: bool
) -> None:
    (served.folder / f"{act}-asked").unlink(missing_ok=True)
    answer = served.chat(act, stream=stream)
    chunks = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]  # type: ignore[attr-defined]
    text = "".join(chunk.content for chunk in chunks)
    assert text == ANSWER
    assert times(served.folder, f"{act}-asked") == 2
    until(lambda: served.inside() == 0)


def test_a_stream_that_had_begun_ends_with_an_error(served: Served) -> None:
    stream = served.chat("die-midway", stream=True)
    texts: list[str | None] = []
    with pytest.raises(openai.APIError, match="its replica was lost"):
        texts.extend(chunk.choices[0].delta.content for chunk in stream)  # type: ignore[attr-defined]
    assert texts == WORDS[: len(texts)]
    assert texts
    until(lambda: served.inside() == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_hangs_up_frees_the_slot(served: Served, stream: bool) -> None:
    (served.folder / "hang-cancelled").unlink(missing_ok=True)
    body = {"model": "policy", "messages": [{"role": "user", "content": "hang"}], "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=1.0)
    until(lambda: times(served.folder, "hang-cancelled") == 1 and served.inside() == 0)


def test_a_caller_who_hangs_up_in_a_stream_frees_the_slot(served: Served) -> None:
    body = {"model": "policy", "messages": [{"role": "user", "content": "stall"}], "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=5) as response:
        first = next(response.iter_lines())
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["content"] == WORDS[0]
    until(lambda: times(served.folder, "stall-cancelled") == 1 and served.inside() == 0)


@pytest.mark.parametrize(
    ("on_one_machine", "node"), [(False, "another"), (False, "this"), (True, "another")], ids=lambda value: str(value)
)
def test_replicas_do_the_same_by_each_way(
    served: Served, run: RunCoroutine, monkeypatch: pytest.MonkeyPatch, on_one_machine: bool, node: str
) -> None:
    """Over HTTP, on one machine, calls are by value and answers come by wire; these are the other three."""
    monkeypatch.setenv("no_grpc_proxy", "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    pass_http_proxies_by()

    async def ask() -> None:
        inbox = Inbox()
        live: DeploymentHandle[Any] = DeploymentHandle("live", NAME)  # what `serve` gives is initialised once for all
        ways: dict[str, Any] = {"meters": Meters(Admission(0)), "on_one_machine": lambda: on_one_machine}
        replicas = Replicas("live", live, retries=3, inbox=inbox, **ways)
        here = ray.get_runtime_context().get_node_id()
        async with inbox.opened(here if node == "this" else node):
            for act in ("hello", "drain-once", "fail-once", "die-once"):
                (served.folder / f"{act}-asked").unlink(missing_ok=True)
                head, document = await replicas.document(asked(act, stream=False))
                assert (head.version, json.loads(document)["choices"][0]["message"]["content"]) == (7, ANSWER)
                assert times(served.folder, f"{act}-asked") == 1 + act.endswith("once")
            begun = await replicas.begin(asked("hello", stream=True))
            assert begun.call._response.by_reference is not on_one_machine
            parts = [part async for part in begun.parts()]
            assert [b"The " in parts[0], b"[DONE]" in parts[0], parts[-1][-14:]] == [True, False, b"data: [DONE]\n\n"]
            begun.close()
            (served.folder / "stall-cancelled").unlink(missing_ok=True)
            begun = await replicas.begin(asked("stall", stream=True))
            begun.close()
            begun = await replicas.begin(asked("fail-midway", stream=True))
            with pytest.raises(FAILED, match="the engine broke"):
                await anext(part async for part in begun.parts() if not part)
            begun.close()
            with pytest.raises(ApiError, match="4 attempts failed, the last with: RuntimeError: the engine is broken"):
                await replicas.begin(asked("fail", stream=True))
        await live.shutdown_async()

    by_wire = times(served.folder, "by-wire")
    run(ask(), timeout_s=60)
    until(lambda: times(served.folder, "stall-cancelled") == 1)
    assert (times(served.folder, "by-wire") > by_wire) is (node == "this")


def asked(act: str, *, stream: bool) -> PolicyRequest:
    return PolicyRequest("chat", {"messages": [{"role": "user", "content": act}], "stream": stream}, "answer", 30.0)


def test_feedback_that_was_acknowledged_outlives_the_process(served: Served, run: RunCoroutine) -> None:
    answer = served.chat("hello")
    said = {"id": answer.id, "kind": "thumbs", "value": "up", "idempotency_key": "k"}  # type: ignore[attr-defined]
    assert httpx.post(f"{served.url}/v1/feedback", json=said, timeout=30).status_code == 200
    actors = ray.util.list_named_actors(all_namespaces=True)
    (door,) = (each for each in actors if f"{NAME}#ingress#" in each["name"])
    ray.kill(ray.get_actor(door["name"], namespace=door["namespace"]))
    with sqlite3.connect(served.folder / "feedback.sqlite") as store:
        found = store.execute("SELECT response_a, value FROM judgments j JOIN tasks t ON t.id = task_id").fetchall()
    assert found == [(answer.id, 1.0)]  # type: ignore[attr-defined]

    async def answers_again() -> None:
        async with httpx.AsyncClient(timeout=10) as client:
            while True:
                try:
                    repeated = await client.post(f"{served.url}/v1/feedback", json=said)
                except httpx.TransportError:
                    repeated = None
                if repeated is not None and repeated.status_code == 200:
                    assert repeated.json()["repeated"] is True
                    return
                await asyncio.sleep(0.2)

    run(answers_again(), timeout_s=60)
