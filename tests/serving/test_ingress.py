"""The ingress in this process: what it lets in, what it says to what is wrong, what it does when replicas fail."""

import asyncio
import contextlib
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx import AsyncClient, Response

from contracts.serving import ServingConfig
from serving import desk as desks
from serving.desk import Desk
from serving.ingress import build_app
from serving.keys import ENVIRONMENT, make_key
from tests.serving.scripted import LocalHandle, ScriptedKeeper, ScriptedReplica, times

Connect = Callable[..., contextlib.AbstractAsyncContextManager[AsyncClient]]


async def fair(messages: list[dict[str, str]], response: str) -> tuple[float, str]:
    if response == "unscorable":
        raise ValueError("no words that it knows")
    return float(len(response)), "v1"


@pytest.fixture
def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """A client of an ingress with these settings; `peer` is the address that the call seems to come from."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)

    @contextlib.asynccontextmanager
    async def open_client(
        *, peer: str = "127.0.0.1", key: str = "", prefix: str = "", **settings: Any
    ) -> AsyncIterator[AsyncClient]:
        config = ServingConfig.model_validate(settings)
        live, pinned = (LocalHandle(ScriptedReplica(tmp_path, version)) for version in (7, 3))
        keeper: Any = LocalHandle(ScriptedKeeper())
        scorers = {"length": (2.0, fair), "again": (1.0, fair)}
        desk = Desk(config, tmp_path, live, keeper, {3: pinned}, scorers)  # type: ignore[arg-type, dict-item]
        app = build_app(desk)
        transport = httpx.ASGITransport(app, client=(peer, 5000), root_path=prefix)
        async with AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            yield client
        desk.store.close()

    return open_client


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "policy", "messages": [{"role": "user", "content": text}]} | more


async def ask(client: AsyncClient, text: str = "hello", **more: Any) -> Response:
    return await client.post("/v1/chat/completions", json=chat(text, **more))


def error(response: Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    found: dict[str, Any] = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    return found


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "user", "content": "  "}]}, "", "needs text"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user' or"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user' or"),
    ({"messages": "hello"}, "messages", "list"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "'hot' is not allowed"),
    ({"temperature": True}, "temperature", "True is not allowed"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 17}, "n", "allowed are 16"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 1025}, "max_tokens", "1 to 1024"),
    ({"max_completion_tokens": 1025}, "max_tokens", "1 to 1024"),
    ({"stop": [""]}, "", "1 to 1000"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"tools": []}, "tools", "leave it out"),
    ({"temprature": 1}, "temprature", "leave it out"),
    ({"stream_options": {"include_usage": True}}, "", "stream: true"),
    ({"top_logprobs": 3}, "", "logprobs: true"),
    ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
    ({"model": None}, "model", "string"),
]


@pytest.mark.parametrize(("change", "param", "says"), BAD_CHATS)
async def test_a_wrong_request_is_told_what_to_change(
    connect: Connect, change: dict[str, Any], param: str, says: str
) -> None:
    async with connect() as client:
        found = error(await ask(client, **change), 400)
    assert says in found["message"]
    assert (found["param"] or "") == param
    assert found["type"] == "invalid_request_error"


async def test_a_body_that_is_no_json_object(connect: Connect) -> None:
    kind = {"content-type": "application/json"}
    async with connect(limits={"max_body_bytes": 1000}) as client:
        for content in (b'{"model":', b"\xff\xfe", b"[]", b"", b"nul", b'"text"', b'{"model": "policy", "n": NaN}'):
            found = error(await client.post("/v1/chat/completions", content=content, headers=kind), 400)
            assert found["message"], content
        assert "not valid JSON" in error(await client.post("/v1/score", content=b"{", headers=kind), 400)["message"]
        assert "1000 bytes" in error(await ask(client, "x" * 1000), 413)["message"]

        async def chunks() -> AsyncIterator[bytes]:  # no content-length
            for _ in range(20):
                yield b"x" * 100

        error(await client.post("/v1/score", content=chunks(), headers=kind), 413)
        assert "no such path" in error(await client.get("/v2/models"), 404)["message"]
        assert "GET is not for" in error(await client.get("/v1/score"), 405)["message"]


async def test_the_chat_page_is_at_the_root(connect: Connect) -> None:
    async with connect() as client:
        page = await client.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        for name in re.findall(r'(?:src|href)="([^#"]+)"', page.text):
            assert (await client.get(f"/{name}")).status_code == 200
        assert "no such path" in error(await client.get("/other.html"), 404)["message"]


async def test_prompts_of_completions(connect: Connect) -> None:
    async with connect() as client:
        bad_ones: tuple[object, ...] = ("", [], ["a", ""], [[]], [-1], 7, [1, "a"])
        for bad in bad_ones:
            error(await client.post("/v1/completions", json={"model": "policy", "prompt": bad}), 400)
        for good in ("hello", ["a", "b"], [5, 6], [[5], [6]]):
            answer = await client.post("/v1/completions", json={"model": "policy", "prompt": good})
            assert answer.json()["choices"][0]["text"] == "The wheel turns."
        too_many = {"model": "policy", "prompt": ["a"] * 9, "n": 2}
        assert "18 choices" in error(await client.post("/v1/completions", json=too_many), 400)["message"]


async def test_fields_of_clients_that_change_nothing_are_taken(connect: Connect) -> None:
    more: dict[str, Any] = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
    }
    async with connect() as client:
        assert (await ask(client, **more, logprobs=None, response_format={"type": "text"})).status_code == 200


async def test_models_and_versions(connect: Connect) -> None:
    async with connect() as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(each["id"], each["weights_version"]) for each in listed] == [("policy", 7), ("policy@3", 3)]
        assert (await client.get("/v1/models/policy@3")).json()["id"] == "policy@3"
        for name, version in (("policy", "7"), ("policy@3", "3")):
            answer = await ask(client, model=name)
            assert answer.headers["x-weights-version"] == version
            assert answer.json()["weights_version"] == int(version)
        for name, says in (("gpt-4", "'gpt-4'"), ("policy@4", "version 4"), ("policy@", "version")):
            found = error(await ask(client, model=name), 404)
            assert says in found["message"]
            assert "policy, policy@3" in found["message"]
            assert found["code"] == "model_not_found"
        assert (await client.get("/health")).json() == {"status": "ok", "weights_version": 7}
        assert (await client.post("/v1/versions/rollback", json={"version": 6})).json()["status"]["current"] == 6
        assert [row["version"] for row in (await client.get("/v1/versions")).json()["history"]] == [6, 7]
        found = error(await client.post("/v1/versions/pin", json={"version": "99"}), 400)
        assert found["message"] == "version 99 is not here: 6 and 7 are"
        assert "latest" in error(await client.post("/v1/versions/pin", json={"version": "newest"}), 400)["message"]
        assert (await client.post("/v1/versions/pin", json={"version": "latest"})).json()["status"]["current"] == 7


async def test_keys_and_their_scopes(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    talk, _ = make_key("talk", "chat", file)
    admin, _ = make_key("admin", "admin,feedback", file)
    async with connect(keys=file) as client:
        assert error(await ask(client), 401)["code"] == "missing_api_key"
        error(await client.get("/v1/models"), 401)
        error(await client.get("/metrics"), 401)
        assert (await client.get("/health")).status_code == 200
        wrong = {"authorization": f"Bearer {talk[:-1]}"}
        assert error(await client.get("/v1/models", headers=wrong), 401)["code"] == "invalid_api_key"
        talks, rules = ({"authorization": f"Bearer {key}"} for key in (talk, admin))
        assert (await client.post("/v1/chat/completions", json=chat(), headers=talks)).status_code == 200
        assert (await client.get("/v1/models", headers=rules)).status_code == 200
        refused = await client.post("/v1/chat/completions", json=chat(), headers=rules)
        assert "may not chat" in error(refused, 403)["message"]
        pin = {"version": "7"}
        assert "may not admin" in error(await client.post("/v1/versions/pin", json=pin, headers=talks), 403)["message"]
        assert (await client.post("/v1/versions/pin", json=pin, headers=rules)).status_code == 200


async def test_keys_are_asked_for_behind_a_prefix_too(connect: Connect, tmp_path: Path) -> None:
    make_key("talk", "chat", tmp_path / "keys")
    async with connect(keys=tmp_path / "keys", prefix="/policy") as client:
        for path in ("chat/completions", "score", "versions/pin", "anything"):
            error(await client.post(f"/policy/v1/{path}", json={}), 401)
        error(await client.get("/policy/metrics"), 401)


async def test_without_keys_only_this_machine_is_answered(connect: Connect) -> None:
    async with connect(peer="10.0.0.7") as client:
        assert error(await ask(client), 401)["code"] == "no_keys"
        error(await client.get("/v1/versions"), 401)
    async with connect() as client:
        assert (await ask(client)).status_code == 200
        for headers in ({"host": "evil.example"}, {"x-forwarded-for": "10.0.0.7"}, {"forwarded": "for=10.0.0.7"}):
            error(await client.post("/v1/chat/completions", json=chat(), headers=headers), 401)


async def test_rates_of_requests_and_tokens(connect: Connect) -> None:
    async with connect(limits={"requests_per_minute": 2}) as client:
        assert [(await ask(client)).status_code for _ in range(3)] == [200, 200, 429]
        refused = await ask(client)
        assert 1 <= int(refused.headers["retry-after"]) <= 30
    async with connect(limits={"tokens_per_minute": 100}) as client:
        # 8 tokens are used by each; what was reserved beyond them is given back.
        assert [(await ask(client, max_tokens=50)).status_code for _ in range(3)] == [200] * 3
        both = await asyncio.gather(ask(client, "slow", max_tokens=70), ask(client, "slow", max_tokens=70))
        assert sorted(answer.status_code for answer in both) == [200, 429]


async def test_who_has_the_last_part_may_ask_again_at_once(connect: Connect) -> None:
    async with connect(limits={"max_waiting": 0}) as client:
        inside: list[tuple[bool, int]] = []

        async def send(message: dict[str, Any]) -> None:
            if part := message.get("body"):
                inside.append((b"[DONE]" in part, app_of(client).state.desk.admission.inside))

        await stream_to(client, send)
    assert inside[-1] == (True, 0)
    assert {held for done, held in inside if not done} == {1}


async def test_who_reads_nothing_does_not_hold_a_place_for_ever(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.completing._READ_S", 0.2)
    async with connect(request_s=0.5) as client:
        sent: list[str] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message["type"])
            if message["type"] == "http.response.body":
                await asyncio.sleep(600)

        await stream_to(client, send)
        assert sent == ["http.response.start", "http.response.body"]
        assert app_of(client).state.desk.admission.inside == 0


def app_of(client: AsyncClient) -> Any:
    return client._transport.app  # type: ignore[attr-defined]


async def stream_to(client: AsyncClient, send: Callable[[dict[str, Any]], Any]) -> None:
    """A streamed chat, each message of the answer as the server would get it; the caller stays until it has ended."""
    came = [{"type": "http.request", "body": json.dumps(chat(stream=True)).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if came:
            return came.pop()
        await asyncio.sleep(600)
        raise AssertionError("it was to end before that")

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    scope |= {"query_string": b"", "client": ("127.0.0.1", 5000), "http_version": "1.1", "scheme": "http", "asgi": {}}
    await asyncio.wait_for(app_of(client)(scope, receive, send), 20)


async def test_over_the_queue_a_refusal_comes_at_once(connect: Connect) -> None:
    async with connect(replicas={"max_running": 2}, limits={"max_waiting": 1}) as client:
        running = [asyncio.ensure_future(ask(client, "slow")) for _ in range(3)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(0.3):
            refused = await ask(client, "slow")
        assert error(refused, 503)["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        metrics = (await client.get("/metrics")).text
        assert "headrace_serving_waiting 1.0" in metrics
        assert {answer.status_code for answer in await asyncio.gather(*running)} == {200}
        metrics = (await client.get("/metrics")).text
        assert "headrace_serving_inside 0.0" in metrics
        assert 'headrace_serving_tokens_total{kind="response"} 9.0' in metrics
        assert 'headrace_serving_requests_total{route="/v1/chat/completions",status="503"} 1.0' in metrics


class GrowingKeeper(ScriptedKeeper):
    """One replica serves; another is about to."""

    state = "starting"

    async def status(self) -> dict[str, Any]:
        status = await super().status()
        (row,) = status["replicas"]
        return status | {"replicas": [row, row | {"replica": "new", "version": None, "state": self.state}]}


async def test_a_replica_has_places_when_it_serves_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "_LOOK_AGAIN_S", 0.01)
    config = ServingConfig.model_validate({"replicas": {"max_running": 2}, "limits": {"max_waiting": 0}})
    keeper = GrowingKeeper()
    desk = Desk(config, tmp_path, LocalHandle(None), LocalHandle(keeper), {}, {})  # type: ignore[arg-type]
    watching = asyncio.create_task(desk.watch_versions())
    await asyncio.sleep(0.1)
    assert [desk.admission.enter("live") for _ in range(3)] == [True, True, False]
    keeper.state = "serving"
    await asyncio.sleep(0.1)
    assert [desk.admission.enter("live") for _ in range(3)] == [True, True, False]
    watching.cancel()
    desk.store.close()


async def test_where_nobody_would_be_let_in_a_request_is_refused_before_it_is_read(connect: Connect) -> None:
    path, broken = "/v1/chat/completions", b"{"
    async with connect(replicas={"max_running": 2}, limits={"max_waiting": 1}) as client:
        live = [asyncio.ensure_future(ask(client, "slow")) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert (await client.post(path, content=broken)).status_code == 400  # it may be for the pinned version
        pinned = [asyncio.ensure_future(ask(client, "slow", model="policy@3")) for _ in range(2)]
        await asyncio.sleep(0.1)
        refused = await client.post(path, content=broken)
        assert error(refused, 503)["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert (await client.get("/v1/models")).status_code == 200
        assert {answer.status_code for answer in await asyncio.gather(*live, *pinned)} == {200}
        assert (await client.post(path, content=broken)).status_code == 400


@pytest.mark.parametrize("act", ["drain-once", "fail-once"])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_replica_is_asked(connect: Connect, tmp_path: Path, act: str, stream: bool) -> None:
    async with connect() as client:
        answer = await ask(client, act, stream=stream)
    assert answer.status_code == 200
    assert times(tmp_path, f"{act}-asked") == 2


async def test_what_replicas_cannot_do(connect: Connect, tmp_path: Path) -> None:
    async with connect(first_token_retries=2, request_s=0.4) as client:
        assert error(await ask(client, "refuse"), 400)["message"] == "too long: at most 256 tokens"
        assert "the engine is broken" in error(await ask(client, "fail"), 500)["message"]
        assert times(tmp_path, "fail-asked") == 3
        assert error(await ask(client, "end"), 500)["code"] == "replica_failed"
        late = await ask(client, "silent")
        assert error(late, 503)["code"] == "timeout"
        assert "retry-after" in late.headers
        await asyncio.sleep(0.1)
        assert times(tmp_path, "silent-cancelled") == 1
        assert "headrace_serving_inside 0.0" in (await client.get("/metrics")).text


def events(text: str) -> list[dict[str, Any]]:
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    return [json.loads(part) for part in parts if part != "[DONE]"]


async def test_a_stream_and_its_usage(connect: Connect) -> None:
    async with connect() as client:
        plain = await ask(client, stream=True)
        assert plain.headers["x-weights-version"] == "7"
        assert plain.headers["content-type"].startswith("text/event-stream")
        assert [each["choices"][0]["delta"]["content"] for each in events(plain.text)] == ["The ", "wheel ", "turns."]
        assert plain.text.endswith("data: [DONE]\n\n")
        counted = events((await ask(client, stream=True, stream_options={"include_usage": True})).text)
        assert counted[-1]["usage"]["completion_tokens"] == 3
        assert len(counted) == 4


async def test_a_stream_that_breaks_says_so(connect: Connect) -> None:
    async with connect(request_s=0.5) as client:
        for act, code in (("fail-midway", "replica_lost"), ("stall", "timeout")):
            answer = await ask(client, act, stream=True)
            assert events(answer.text)[-1]["error"]["code"] == code
            assert "[DONE]" not in answer.text
        assert "headrace_serving_inside 0.0" in (await client.get("/metrics")).text


async def test_score(connect: Connect) -> None:
    async with connect() as client:
        for prompt in ({"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}):
            found = (await client.post("/v1/score", json=prompt | {"response": "four"})).json()
            assert found["reward"] == 4 * 2 + 4
            assert found["components"][0] == {"name": "length", "score": 4.0, "weight": 2.0, "version": "v1"}
        bad = error(await client.post("/v1/score", json={"prompt": "x", "response": "unscorable"}), 400)
        assert "no words that it knows" in bad["message"]
        error(await client.post("/v1/score", json={"response": "x"}), 400)


async def judge(client: AsyncClient, answer_id: str, **more: Any) -> Response:
    return await client.post("/v1/feedback", json={"id": answer_id, "idempotency_key": "k"} | more)


async def test_feedback_of_each_kind_is_stored_with_the_answer(connect: Connect, tmp_path: Path) -> None:
    async with connect() as client:
        first, other = [(await ask(client, n=2)).json()["id"] for _ in range(2)]
        streamed = events((await ask(client, stream=True)).text)[0]["id"]
        said: list[dict[str, Any]] = [
            {"kind": "thumbs", "value": "up"},
            {"kind": "label", "value": 0},
            {"kind": "rating", "value": 4},
            {"kind": "correction", "text": "better", "choice_index": 1},
            {"kind": "comparison", "other_id": other, "preferred": "this"},
        ]
        for number, each in enumerate(said):
            receipt = (await judge(client, first, idempotency_key=f"k{number}", **each)).json()
            assert (receipt["weights_version"], receipt["repeated"]) == (7, False)
        assert (await judge(client, streamed, kind="thumbs", value="down")).status_code == 200
        rows = sqlite3.connect(tmp_path / "feedback.sqlite").execute(
            "SELECT t.kind, j.value, j.choice, j.text, p.text, a.text, a.weights_version, n.name FROM judgments j "
            "JOIN tasks t ON j.task_id = t.id JOIN responses a ON t.response_a = a.id "
            "JOIN prompts p ON a.prompt_id = p.id JOIN annotators n ON n.id = j.annotator_id ORDER BY j.id"
        )
        found = list(rows)
    answer = ("hello", "The wheel turns.", 7, "local")
    assert found[:4] == [
        ("thumbs", 1, None, None, *answer),
        ("label", 0, None, None, *answer),
        ("rating", 4, None, None, *answer),
        ("correction", None, None, "better", *answer),
    ]
    assert found[4][0] == "pair"
    assert found[4][2] == ("a" if first < other else "b")
    assert found[5] == ("thumbs", 0, None, None, *answer)


async def test_feedback_that_is_refused(connect: Connect) -> None:
    async with connect(answers_kept=2) as client:
        answer_id = (await ask(client)).json()["id"]
        assert "no such answer" in error(await judge(client, "chatcmpl-1", kind="thumbs", value="up"), 404)["message"]
        error(await judge(client, answer_id, kind="thumbs", value="up", choice_index=1), 404)
        for bad in (
            {"kind": "thumbs", "value": 1},
            {"kind": "label", "value": 2},
            {"kind": "rating", "value": True},
            {"kind": "rating"},
            {"kind": "correction", "value": 1},
            {"kind": "comparison", "other_id": answer_id, "preferred": "this"},
            {"kind": "thumbs", "value": "up", "extra": 1},
        ):
            error(await judge(client, answer_id, **bad), 400)
        assert (await judge(client, answer_id, kind="thumbs", value="up")).json()["repeated"] is False
        assert (await judge(client, answer_id, kind="thumbs", value="up")).json()["repeated"] is True
        changed = error(await judge(client, answer_id, kind="thumbs", value="down"), 409)
        assert changed["code"] == "key_reused"
        again = await judge(client, answer_id, kind="thumbs", value="down", idempotency_key="other")
        assert error(again, 409)["code"] == "already_voted"
        assert (
            await judge(client, answer_id, kind="thumbs", value="down", idempotency_key="u", user="anna")
        ).status_code == 200
        for _ in range(2):
            await ask(client)
        # It has left the newest two, and is in the store: people who judged it may go on.
        assert (await judge(client, answer_id, kind="label", value=1, idempotency_key="l")).status_code == 200


def hide(text: str) -> str:
    if text == "break":
        raise KeyError("redact")
    return text.replace("secret", "***")


async def test_prompts_are_logged_only_when_asked_for(connect: Connect, tmp_path: Path) -> None:
    log = tmp_path / "prompts.jsonl"
    async with connect() as client:
        await ask(client, "a secret")
    assert not log.exists()
    async with connect(log_prompts=True, redact=f"{__name__}:hide") as client:
        for stream in (False, True):
            await ask(client, "a secret", stream=stream)
        assert (await ask(client, "break")).status_code == 200
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [[{"role": "user", "content": "a ***"}]] * 2
    assert [line["response"] for line in lines] == [["The wheel turns."]] * 2
