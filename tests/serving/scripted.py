"""A replica and a version keeper that do what the prompt tells them to: they speak as the real ones do, and are small.

The last word of a prompt is what happens; words that happen `once` leave a mark in the folder and are ordinary after.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import ray

from serving.records import Head, PolicyRequest, VersionRow
from serving.wire import Wires

WORDS = ["The ", "wheel ", "turns."]
PAUSE_S = 0.05


class ScriptedReplica:
    """Answers `WORDS`, one a token; each choice and prompt alike."""

    def __init__(self, folder: Path, version: int = 7) -> None:
        self._folder, self._version = folder, version
        self._name = f"replica-{os.getpid()}"
        self._wires = Wires(ray.get_runtime_context().get_node_id() if ray.is_initialized() else "")

    async def answer(self, request: PolicyRequest) -> AsyncIterator[Head | bytes]:
        body = request.body
        said = body["messages"][-1]["content"] if request.kind == "chat" else str(body["prompt"])
        act = said.split()[-1]
        self.mark(f"{act}-asked")
        reply = self._wires.reached(request.reply_to)
        try:
            async with aclosing(self._act(act, request)) as said:
                if reply is not None:
                    self.mark("by-wire")
                    await self._wires.deliver(_written(said), reply)
                    return
                async for part in said:
                    yield part
        except (asyncio.CancelledError, GeneratorExit):
            self.mark(f"{act}-cancelled")
            raise

    async def _act(self, act: str, request: PolicyRequest) -> AsyncGenerator[Any, None]:
        head = Head(200, self._version, self._name)
        if act == "drain-once" and self.times("drain-once-asked") == 1:
            yield Head(200, self._version, self._name, draining=True)
            return
        if act == "refuse":
            error = {"message": "too long: at most 256 tokens", "type": "invalid_request_error", "param": "messages"}
            yield Head(400, self._version, self._name, error=error)
            return
        if act == "die" or (act == "die-once" and self.times("die-once-asked") == 1):
            os._exit(1)
        if act == "fail" or (act == "fail-once" and self.times("fail-once-asked") == 1):
            raise RuntimeError("the engine is broken")
        yield head
        if act == "die-after-head-once" and self.times("die-after-head-once-asked") == 1:
            os._exit(1)
        if act == "end":
            return
        if act in ("silent", "hang"):
            await asyncio.sleep(60)
        async for part in self._events(act, request) if request.body.get("stream") else self._document(act, request):
            yield part

    async def _document(self, act: str, request: PolicyRequest) -> AsyncIterator[bytes]:
        if act == "slow":
            await asyncio.sleep(0.5)
        text, chat = "".join(WORDS), request.kind == "chat"
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices = [{"index": index, "finish_reason": "stop"} | said for index in range(request.body.get("n", 1))]
        yield json.dumps(self._named(request) | {"choices": choices, "usage": usage()}).encode()

    async def _events(self, act: str, request: PolicyRequest) -> AsyncIterator[bytes]:
        chat = request.kind == "chat"
        for number, word in enumerate(WORDS):
            said: dict[str, Any] = {"delta": {"role": "assistant", "content": word}} if chat else {"text": word}
            finish = "stop" if word == WORDS[-1] else None
            choice = {"index": 0, "finish_reason": finish} | said
            yield event(self._named(request) | {"choices": [choice]})
            if act == "die-midway" and number == 1:
                os._exit(1)
            if act == "fail-midway" and number == 1:
                raise RuntimeError("the engine broke")
            await asyncio.sleep(20 if act == "stall" else PAUSE_S)
        yield event(self._named(request) | {"choices": [], "usage": usage()})
        yield b"data: [DONE]\n\n"

    def _named(self, request: PolicyRequest) -> dict[str, Any]:
        kind = "chat.completion" if request.kind == "chat" else "text_completion"
        named = {"id": request.answer_id, "weights_version": self._version, "created": 1, "model": "policy"}
        return named | {"object": f"{kind}.chunk" if request.body.get("stream") else kind}

    def mark(self, name: str) -> None:
        with (self._folder / name).open("a") as out:
            out.write("x")

    def times(self, name: str) -> int:
        return times(self._folder, name)


async def _written(said: AsyncIterator[Head | bytes]) -> AsyncIterator[bytes]:
    async for part in said:
        yield part.written() if isinstance(part, Head) else part


def times(folder: Path, name: str) -> int:
    path = folder / name
    return path.stat().st_size if path.exists() else 0


def usage() -> dict[str, int]:
    return {"prompt_tokens": 5, "completion_tokens": len(WORDS), "total_tokens": 5 + len(WORDS)}


def event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


class ScriptedKeeper:
    """Versions 6 and 7; 7 is served."""

    def __init__(self, replicas: int = 1) -> None:
        self._current, self._replicas = 7, replicas

    async def status(self) -> dict[str, Any]:
        row = {"slot": "live", "version": self._current, "state": "serving", "since": 0.0}
        replicas = [row | {"replica": str(number)} for number in range(self._replicas)]
        return {"current": self._current, "follow": "latest", "newest": 7, "replicas": replicas}

    async def history(self) -> list[VersionRow]:
        return [VersionRow(version, float(version), "promoted", "newest") for version in (6, 7)]

    async def pin(self, target: str) -> dict[str, Any]:
        if target not in ("6", "7", "latest"):
            raise ValueError(f"version {target} is not here: 6 and 7 are")
        self._current = 7 if target == "latest" else int(target)
        return await self.status()

    async def rollback(self, version: int) -> dict[str, Any]:
        return await self.pin(str(version))


class LocalHandle:
    """A deployment's handle, without Serve: methods run in this process."""

    def __init__(self, target: Any, method: str = "") -> None:
        self._target, self._method = target, method

    def _init(self, **settings: Any) -> None:
        """There is no router."""

    def options(self, *, stream: bool = True, method_name: str = "", **settings: Any) -> "LocalHandle":
        assert stream
        return LocalHandle(self._target, method_name or self._method)

    def remote(self, *arguments: Any) -> Any:
        found = getattr(self._target, self._method)(*arguments)
        return LocalAnswer(found) if isinstance(found, AsyncIterator) else found

    def __getattr__(self, name: str) -> "LocalHandle":
        return LocalHandle(self._target, name)


class LocalAnswer:
    """A generator in a task of its own, as in another process: `cancel` cancels the task."""

    def __init__(self, parts: AsyncIterator[Any]) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run(parts))

    async def _run(self, parts: AsyncIterator[Any]) -> None:
        from ray.exceptions import RayTaskError

        try:
            async for part in parts:
                self._queue.put_nowait(part)
        except RuntimeError as error:
            self._queue.put_nowait(RayTaskError("answer", str(error), error))
        self._queue.put_nowait(StopAsyncIteration())

    def __aiter__(self) -> "LocalAnswer":
        return self

    async def __anext__(self) -> Any:
        part = await self._queue.get()
        if isinstance(part, Exception):
            raise part
        return part

    def cancel(self) -> None:
        self._task.cancel()
