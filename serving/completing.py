"""POST /v1/chat/completions and /v1/completions, GET /v1/models."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from contracts.clock import now
from contracts.events import Event, first_line
from contracts.waiting import NoAnswer
from serving.answers import Answer
from serving.asking import FAILED, Begun, tell
from serving.desk import Desk, new_answer_id
from serving.protocol import ApiError, ChatRequest, CompletionRequest, check_limits
from serving.records import LIVE, PolicyRequest

VERSION_HEADER = "X-Weights-Version"
_BYTES_A_TOKEN = 4  # of a prompt, for the reservation; what was really used is settled afterwards
_NO_CHOICES = b'"choices":[]'  # quotation marks inside of texts are escaped, so this is never a part of one
_READ_S = 30.0  # for a caller to take what is left of its answer, when all of it is there
_DONE = b"data: [DONE]\n\n"
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "n", "stop"}

Body = ChatRequest | CompletionRequest
Used = Callable[[float], None]

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    return await complete("chat", body, request)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    return await complete("completion", body, request)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The live version and each pinned one, by the names that they are asked for."""
    desk: Desk = request.app.state.desk
    status = await desk.ask_keeper("status")
    data = [
        {
            "id": name,
            "object": "model",
            "created": desk.began_s,
            "owned_by": "headrace",
            "weights_version": status["current"] if slot == LIVE else int(slot.removeprefix("pinned-")),
        }
        for name, slot in desk.models().items()
    ]
    return {"object": "list", "data": data}


@router.get("/v1/models/{name}")
async def model(name: str, request: Request) -> dict[str, Any]:
    request.app.state.desk.replicas(name)
    return next(each for each in (await models(request))["data"] if each["id"] == name)


async def complete(
    kind: Literal["chat", "completion"], body: ChatRequest | CompletionRequest, request: Request
) -> Response:
    """Checked, let in, answered: as one document or as a stream of events."""
    began, desk, caller = now(), request.app.state.desk, request.scope["key"].name
    limits = desk.config.limits
    replicas = desk.replicas(body.model)
    check_limits(body, limits)
    prompt_chars = sum(map(len, [body.text] if isinstance(body, ChatRequest) else body.texts()))
    choices = body.prompts * (body.n or 1)
    reserved = prompt_chars / _BYTES_A_TOKEN + choices * (body.most_tokens or limits.max_response_tokens)
    with ExitStack() as stack:
        tell_used = stack.enter_context(desk.token_budget(caller, reserved))
        place = stack.enter_context(ExitStack())
        place.enter_context(desk.place(replicas.slot))
        ask = PolicyRequest(kind, body.for_engine(desk.config.name), new_answer_id(kind), desk.config.request_s)
        record = _Record(desk, body, ask, caller, began, tell_used)
        if body.stream:
            begun = await replicas.begin(ask)
            stack.callback(begun.close)
            return _Events(begun, record, place, stack.pop_all())
        head, document = await replicas.document(ask)
        record.first_byte()
        record.add(json.loads(document))
        record.keep(head.version)
        return Response(document, media_type="application/json", headers={VERSION_HEADER: str(head.version)})


class _Record:
    """What an answer has become: its texts and tokens, for feedback, rates, metrics and the log."""

    def __init__(self, desk: Desk, body: Body, ask: PolicyRequest, caller: str, began: float, tell_used: Used) -> None:
        self.body = body
        self._desk, self._ask, self._caller, self._began, self._tell_used = desk, ask, caller, began, tell_used
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._usage: dict[str, int] = {}
        self._kept = False

    def first_byte(self) -> None:
        self._desk.meters.first_byte(now() - self._began)

    def cut(self) -> None:
        self._desk.meters.cut()

    def add(self, found: dict[str, Any]) -> None:
        """One JSON object of the answer: all of it, or an event."""
        for choice in found.get("choices", ()):
            said = choice.get("message") or choice.get("delta") or choice
            self._texts[choice["index"]].append(said.get("content") or said.get("text") or "")
        self._usage = found.get("usage") or self._usage

    def keep(self, version: int) -> None:
        """Once. Where a stream was cut, each of its parts counts as a token."""
        if self._kept:
            return
        self._kept = True
        parts = sum(map(len, self._texts.values()))
        prompt, response = self._usage.get("prompt_tokens", 0), self._usage.get("completion_tokens", parts)
        self._tell_used(prompt + response)
        self._desk.meters.tokens(prompt, response)
        texts = ["".join(self._texts[index]) for index in range(max(self._texts, default=-1) + 1)]
        body = self.body
        asked = [body.text] if isinstance(body, ChatRequest) else body.texts()
        choices = body.n or 1  # of each prompt, in the order of the prompts
        prompts = [asked[min(index // choices, len(asked) - 1)] for index in range(len(texts))]
        messages = body.turns() if isinstance(body, ChatRequest) else None
        sampling = body.model_dump(include=_SAMPLING, exclude_none=True)
        answer_id = self._ask.answer_id
        self._desk.answers.add(answer_id, Answer(prompts, messages, texts, version, self._caller, sampling))
        self._desk.log_prompt(id=answer_id, model=body.model, prompt=messages or prompts, response=texts)


class _Events(StreamingResponse):
    """Server-sent events. Whatever ends them, the place is given back and the engine stops working on them."""

    def __init__(self, begun: Begun, record: _Record, place: ExitStack, held: ExitStack) -> None:
        self._begun, self._record, self._place, self._held = begun, record, place, held
        self._seen: list[bytes] = []
        headers = {VERSION_HEADER: str(begun.head.version), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                async with asyncio.timeout(self._begun.expires - now() + _READ_S) as deadline:
                    # Without Starlette's own watch for a caller who hangs up: the door has one, and ends this.
                    await self.stream_response(send)
            except TimeoutError:
                if not deadline.expired():
                    raise
                tell(Event("expiry", "a caller", f"took none of its answer for {_READ_S:g} s", "it is cut off"))
            finally:
                self._keep()

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            self._record.first_byte()
            async for part in self._begun.parts():
                self._seen.append(part)
                if part.endswith(_DONE):
                    # Before the caller, who has it all then, can say what they think of it, or ask again.
                    self._keep()
                    self._place.close()
                if shown := self._shown(part):
                    yield shown
        except (*FAILED, NoAnswer) as error:
            self._record.cut()
            consequence = "a stream that had begun ends with an error"
            tell(Event("death", self._begun.head.replica, first_line(error), consequence))
            late = isinstance(error, NoAnswer)
            said = "took longer than it may" if late else "was cut off, its replica was lost"
            code = "timeout" if late else "replica_lost"
            cut = ApiError(503, f"the answer {said}: ask again for a whole one", code=code)
            yield f"data: {json.dumps({'error': cut.error})}\n\n".encode()

    def _keep(self) -> None:
        """The events are read here and not one by one: between two tokens the caller would wait for it."""
        seen, self._seen = b"".join(self._seen), []
        for event in seen.decode("utf-8", "replace").split("\n\n"):
            if event.startswith("data: {"):
                self._record.add(json.loads(event.removeprefix("data: ")))
        self._record.keep(self._begun.head.version)

    def _shown(self, part: bytes) -> bytes:
        """Without the event of the usage, where the caller did not ask for it."""
        options = self._record.body.stream_options
        if _NO_CHOICES not in part or (options is not None and options.include_usage):
            return part
        return b"\n\n".join(event for event in part.split(b"\n\n") if _NO_CHOICES not in event)
