"""The chat page in a real browser, in front of a small stand-in for the policy's API."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from playwright.sync_api import Browser, Page, expect

from serving.ingress import add_chat_page
from serving.protocol import FeedbackRequest
from tests.browser import check_readable, chromium, new_page
from tests.serving.http import served

HOSTILE = "<img src=x onerror='window.broken = 1'> \U0001f600 caf\u00e9"


@dataclass
class Policy:
    """What the API was asked, and how it answers."""

    key: str = ""
    version: int = 3
    refuse_feedback: bool = False
    endless: bool = False
    break_off: bool = False
    models_s: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    thumbs: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0  # streams that their reader left

    def app(self) -> FastAPI:
        app = FastAPI()

        def refusal(request: Request) -> JSONResponse | None:
            if not self.key or request.headers.get("Authorization") == f"Bearer {self.key}":
                return None
            error = {"message": "There is no such key.", "type": "authentication_error", "param": None, "code": None}
            return JSONResponse({"error": error}, 401)

        @app.get("/v1/models")
        async def models(request: Request) -> Any:
            await asyncio.sleep(self.models_s)
            return refusal(request) or {"object": "list", "data": [{"id": "policy"}, {"id": "policy@1"}]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            body = await request.json()
            if refused := refusal(request):
                return refused
            self.asked.append(body)
            version = int(body["model"].partition("@")[2] or self.version)
            headers = {"X-Weights-Version": str(version)}
            return StreamingResponse(self.stream(body, version), media_type="text/event-stream", headers=headers)

        @app.post("/v1/feedback")
        async def feedback(request: Request) -> Any:
            if self.refuse_feedback:
                error = {"message": "That answer is not kept any more.", "type": "x", "param": None, "code": None}
                return JSONResponse({"error": error}, 404)
            self.thumbs.append(await request.json())
            return {"id": 1}

        add_chat_page(app)
        return app

    async def stream(self, body: dict[str, Any], version: int) -> AsyncIterator[bytes]:
        said = f"You said: {body['messages'][-1]['content']}"
        event = {"id": f"answer of {body['model']}", "object": "chat.completion.chunk", "weights_version": version}
        try:
            for word in [*said, *(["."] * 10_000 if self.endless else [])]:
                choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
                data = f"data: {json.dumps(event | {'choices': [choice]}, ensure_ascii=False)}\n\n".encode()
                for part in (data[:-3], data[-3:]):  # characters and lines cut anywhere
                    yield part
                await asyncio.sleep(0.01 if self.endless else 0)
            if self.break_off:
                return
            end = {"index": 0, "delta": {}, "finish_reason": "length"}
            yield f"data: {json.dumps(event | {'choices': [end]})}\n\ndata: [DONE]\n\n".encode()
        finally:
            self.left += self.endless


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def page(browser: Browser, policy: Policy) -> Iterator[Page]:
    with served(policy.app()) as url:
        found, wrong = new_page(browser)
        found.goto(url)
        yield found
        found.context.close()
    assert [line for line in wrong if "status of 40" not in line] == []


def say(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def test_what_is_sent_before_the_models_are_known_waits_for_them(page: Page, policy: Policy) -> None:
    policy.models_s = 0.5
    page.reload()
    say(page, "hello")
    expect(page.locator(".turn:not(.mine) .text")).to_have_text("You said: hello")
    assert [asked["model"] for asked in policy.asked] == ["policy"]


def test_a_conversation_with_the_version_of_each_answer(page: Page, policy: Policy) -> None:
    expect(page.locator("#model-0")).to_have_value("policy")
    say(page, HOSTILE)
    answers = page.locator(".turn:not(.mine)")
    expect(answers.locator(".version")).to_have_text("weights version 3 · cut at the token limit")
    expect(answers.locator(".text")).to_have_text(f"You said: {HOSTILE}")
    assert page.evaluate("window.broken") is None
    assert page.locator(".talk img").count() == 0
    policy.version = 4
    say(page, "and now?")
    expect(answers.nth(1).locator(".version")).to_contain_text("weights version 4")
    roles = [message["role"] for message in policy.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert policy.asked[1]["messages"][1]["content"] == f"You said: {HOSTILE}"
    assert policy.asked[1]["max_tokens"] == 256
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    say(page, "hello")
    expect(page.locator(".version")).to_have_count(1)
    assert len(policy.asked[2]["messages"]) == 1


def test_thumbs(page: Page, policy: Policy) -> None:
    policy.refuse_feedback = True
    say(page, "hello")
    page.get_by_role("button", name="Good answer").click()
    expect(page.locator(".outcome")).to_have_text("That answer is not kept any more.")
    policy.refuse_feedback = False
    page.get_by_role("button", name="Good answer").click()
    expect(page.locator(".outcome")).to_have_text("Thank you.")
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    (thumb,) = policy.thumbs
    FeedbackRequest.model_validate(thumb)  # as the policy does
    assert (thumb["id"], thumb["value"], len(thumb["idempotency_key"])) == ("answer of policy", "up", 32)


def test_two_versions_side_by_side(page: Page, policy: Policy) -> None:
    page.get_by_label("beside another").check()
    expect(page.get_by_label("Other model")).to_have_value("policy@1")
    say(page, "hello")
    expect(page.locator(".version")).to_have_text(
        ["weights version 3 · cut at the token limit", "weights version 1 · cut at the token limit"]
    )
    assert {body["model"] for body in policy.asked} == {"policy", "policy@1"}
    page.get_by_role("region", name="policy@1").get_by_role("button", name="Bad answer").click()
    expect(page.locator(".outcome", has_text="Thank you.")).to_have_count(1)
    (thumb,) = policy.thumbs
    assert thumb["id"] == "answer of policy@1"
    check_readable(page)


def test_the_key_stays_in_memory(browser: Browser, policy: Policy) -> None:
    policy.key = "secret-1"
    with served(policy.app()) as url:
        page, _ = new_page(browser, scheme="dark", width=390)
        page.goto(url)
        expect(page.get_by_role("alert")).to_contain_text("Enter your API key above")
        page.get_by_label("API key").fill("secret-1")
        page.get_by_label("API key").press("Tab")
        expect(page.get_by_role("alert")).to_be_hidden()
        say(page, "hello")
        expect(page.locator(".version")).to_contain_text("weights version 3")
        stores = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        assert "secret" not in page.evaluate(stores)
        check_readable(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.context.close()


def test_stop_ends_the_request(page: Page, policy: Policy) -> None:
    policy.endless = True
    say(page, "hello")
    expect(page.locator(".turn:not(.mine) .text")).to_contain_text("You said: hello..")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".version")).to_contain_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    for _ in range(100):
        if policy.left:
            break
        page.wait_for_timeout(50)
    assert policy.left == 1, "the server was told"


def test_an_answer_that_breaks_off_says_so_and_is_no_part_of_the_conversation(page: Page, policy: Policy) -> None:
    policy.break_off = True
    say(page, "hello")
    expect(page.locator(".version")).to_contain_text("The answer broke off")
    expect(page.get_by_role("button", name="Good answer")).to_have_count(0)
    policy.break_off = False
    say(page, "again")
    expect(page.locator(".version")).to_have_count(2)
    assert [message["content"] for message in policy.asked[1]["messages"]] == ["again"]
