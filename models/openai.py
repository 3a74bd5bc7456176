"""vLLM's own OpenAI handlers on our engine: chat and text completions, streamed or as one JSON document.

They render prompts, check sampling values and write the answers; of the answers only the beginning is changed, as
text: the id is that of the request and the version of the weights stands beside it. Where several versions wrote an
answer, because weights were exchanged in the middle of it, all of them stand there once it is finished.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from models.engine import Engine

Kind = Literal["chat", "completion"]

_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}  # what vLLM puts before the id of a request
_ERROR = 'data: {"error"'

# The versions that wrote the answer which this task begins, in their order, as far as its choices are finished.
_WRITTEN: ContextVar[list[int]] = ContextVar("_WRITTEN")


class Refused(ValueError):
    """A request that the model cannot take: the HTTP `status`, and the `error` object in the OpenAI shape."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.status, self.error = status, error


@dataclass(frozen=True)
class Answer:
    """An answer from its first token on: SSE events, or one JSON document. Closing `parts` aborts it.

    `version` is that of the weights that wrote the first token. In the parts it is `weights_version`; where others
    wrote on, `weights_versions` is all of them in their order, from the end of the first choice on.
    """

    version: int
    parts: AsyncGenerator[bytes, None]


class _Client:
    """The engine as vLLM's handlers see it: which versions write is noted in the `_WRITTEN` of who asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.llm, name)

    def generate(self, *arguments: Any, **settings: Any) -> AsyncGenerator[Any, None]:
        return _noted(self._engine, arguments, settings, _WRITTEN.get())


async def _noted(
    engine: Engine, arguments: Sequence[Any], settings: dict[str, Any], written: list[int]
) -> AsyncGenerator[Any, None]:
    """What the engine generates, with its newest adapter where it has some. The version of that goes to `written` at
    once; without adapters those of each choice do, when it has finished."""
    with engine.adapter() as adapter:
        if adapter is not None:
            settings["lora_request"] = adapter.request
            if adapter.version not in written:
                written.append(adapter.version)
        outputs: Any = engine.llm.generate(*arguments, **settings)
        async with aclosing(outputs):
            async for output in outputs:
                for choice in output.outputs if adapter is None else ():
                    versions = (int(span.version) for span in choice.weight_versions or ())
                    written.extend(version for version in versions if version not in written)
                yield output


class OpenAIHandlers:
    """Answers OpenAI requests with `engine`, which calls itself `name` in them; on the engine's event loop.

    Without `max_tokens` a chat gets what fits behind its prompt and a completion 16 tokens, the API's own default. None
    gets more than `most_tokens`.
    """

    def __init__(self, engine: Engine, name: str, *, most_tokens: int) -> None:
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
        from vllm.entrypoints.openai.models.protocol import BaseModelPath
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
        from vllm.renderers.online_renderer import OnlineRenderer

        llm: Any = _Client(engine)
        template: dict[str, Any] = {"chat_template": None, "chat_template_content_format": "auto"}  # the model's own
        models = OpenAIServingModels(llm, [BaseModelPath(name=name, model_path=name)])
        renderer = OnlineRenderer(llm.model_config, llm.renderer, request_logger=None, **template)
        renderer.warmup()
        ours: dict[str, Any] = {"online_renderer": renderer, "request_logger": None}
        self._engine = engine
        self._chat = OpenAIServingChat(llm, models, "assistant", **ours, **template)
        self._completion = OpenAIServingCompletion(llm, models, **ours)
        self._chat.override_max_tokens = self._completion.override_max_tokens = most_tokens

    async def answer(self, kind: Kind, body: dict[str, Any], *, answer_id: str) -> Answer:
        """Begin an answer and wait, without a deadline, for its first token, or for all of it if it is not streamed.

        Cancelling this, or closing the parts of what it returned, aborts the request in the engine. An engine that
        dies after the first token is an error event of the stream.

        Raises:
            Refused: the model cannot take this request.
            WeightsError: the engine is broken.
        """
        salt = await self._engine.accepting()
        ours = {"model": None, "request_id": answer_id, "cache_salt": salt}
        written: list[int] = []
        asking = _WRITTEN.set(written)
        try:
            created = await self._created(kind, body | ours)
        finally:
            _WRITTEN.reset(asking)
        theirs = f'{{"id":{json.dumps(_PREFIX[kind] + answer_id)}'
        if isinstance(created, str):
            version = written[0] if written else self._engine.version
            return Answer(version, _parts(_named(created, theirs, answer_id, version, written)))
        first = await self._first(created)
        version = written[0] if written else self._engine.version

        def named() -> bytes:
            return b"data: " + _named(theirs, theirs, answer_id, version, written)

        return Answer(version, _events(first, created, f"data: {theirs}", named))

    async def abort(self, kind: Kind, body: dict[str, Any], *, answer_id: str) -> None:
        """End an answer now: what it has so far is all of it, and its finish_reason is "abort"."""
        request_id = f"{_PREFIX[kind]}{answer_id}"
        prompts = body["prompt"] if kind == "completion" else ""
        several = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
        parts = [f"{request_id}-{index}" for index in range(len(prompts) if several else 1)]
        await self._engine.llm.abort([request_id] if kind == "chat" else parts)

    async def _created(self, kind: Kind, body: dict[str, Any]) -> AsyncGenerator[str, None] | str:
        """What vLLM's handler gives: a stream of events, or a JSON document."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve import create_error_response
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        created: Any
        try:
            if kind == "chat":
                created = await self._chat.create_chat_completion(ChatCompletionRequest(**body))
            else:
                created = await self._completion.create_completion(CompletionRequest(**body))
        except ValidationError as error:
            raise Refused(400, _invalid(error)) from error
        except EngineDeadError as error:
            raise self._engine.died(error) from error
        # Where vLLM's own server has a handler that turns them into an answer: prompts and values that it refuses.
        except (VLLMClientError, ValueError, TypeError, OverflowError, NotImplementedError) as error:
            created = create_error_response(error)
        if isinstance(created, ErrorResponse):
            raise _refused(created.model_dump()["error"])
        return created if isinstance(created, AsyncGenerator) else str(created.model_dump_json())

    async def _first(self, events: AsyncGenerator[str, None]) -> str:
        """The first event, after which the request is accepted: some are refused only there."""
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        if not first.startswith(_ERROR):
            return first
        await events.aclose()
        if self._engine.llm.errored:
            raise self._engine.died(self._engine.llm.dead_error)
        raise _refused(json.loads(first.removeprefix("data: "))["error"])


async def _events(
    first: str, events: AsyncGenerator[str, None], theirs: str, named: Callable[[], bytes]
) -> AsyncGenerator[bytes, None]:
    """Each event with what `named` gives in place of its beginning; its JSON is not read."""
    length = len(theirs)
    yield named() + first[length:].encode()
    async with aclosing(events):
        async for event in events:
            yield named() + event[length:].encode() if event.startswith(theirs) else event.encode()


async def _parts(document: bytes) -> AsyncGenerator[bytes, None]:
    yield document


def _named(text: str, theirs: str, answer_id: str, version: int, written: Sequence[int]) -> bytes:
    """A JSON object of vLLM's with our id, and the version beside it; `written` too, where there are several."""
    if not text.startswith(theirs):
        raise RuntimeError(f"vLLM's answer does not begin with {theirs}: {text[:80]}")
    several = f',"weights_versions":{json.dumps(written)}' if len(written) > 1 else ""
    return f'{{"id":{json.dumps(answer_id)},"weights_version":{version}{several}{text[len(theirs) :]}'.encode()


def _refused(error: dict[str, Any]) -> Refused:
    """vLLM's `code` is the status."""
    status = error.pop("code")
    kind = "invalid_request_error" if status < 500 else "server_error"
    return Refused(status, {"message": error["message"], "type": kind, "param": error["param"], "code": None})


def _invalid(error: ValidationError) -> dict[str, Any]:
    """The first thing that is wrong with a request, by the name of its field."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part != "__root__")
    message = first["msg"].removeprefix("Value error, ")
    return {
        "message": f"{field}: {message}" if field else message,
        "type": "invalid_request_error",
        "param": field or None,
        "code": None,
    }
