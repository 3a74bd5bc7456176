"""A client that measures: what became of each request, and when. It parses little, since it shares the cores."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_TEXT = re.compile(rb'"(?:content|text)": ?"[^"]')
_VERSION = "X-Weights-Version"
_TOPICS = ("rivers", "mills", "bread", "the sea", "winter", "clocks", "bridges", "trees", "maps", "music", "rain")


@dataclass
class Told:
    """One request: seconds on this process's monotonic clock, `first` that of the first text (nan where none came)."""

    prompt: str
    streamed: bool
    sent: float
    first: float = math.nan
    ended: float = math.nan
    status: int = 0  # 0: no whole HTTP answer came
    version: int | None = None
    error: str = ""
    retry_after: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    objects: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def tokens(self) -> int:
        return self.usage.get("completion_tokens", 0)

    @property
    def first_token_s(self) -> float:
        return self.first - self.sent

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


class Client:
    """Asks one server. `keep` keeps every JSON object of an answer, for those who read the tokens."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, keep: bool = False) -> None:
        self._session, self._url, self._keep = session, url, keep

    async def ask(self, body: dict[str, Any]) -> Told:
        """Never raises for what the server or the network does: `status` and `error` tell."""
        told = Told(body["messages"][-1]["content"], bool(body.get("stream")), time.monotonic())
        try:
            async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as answer:
                if answer.status != 200 or not told.streamed:
                    document = json.loads(await answer.read())
                    told.error = document.get("error", {}).get("message", "")
                    told.first = time.monotonic()
                    told.usage = document.get("usage") or {}
                    told.objects = [document] if self._keep else []
                else:
                    await self._read_events(answer, told)
                told.retry_after = answer.headers.get("Retry-After")
                version = answer.headers.get(_VERSION)
                told.version = int(version) if version else None
                told.status = answer.status
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            told.error = f"{type(error).__name__}: {error}"
        told.ended = time.monotonic()
        return told

    async def get(self, path: str) -> Any:
        """The JSON document at `path`. Raises aiohttp.ClientError where there is none."""
        async with self._session.get(f"{self._url}{path}", raise_for_status=True) as answer:
            return await answer.json()

    async def _read_events(self, answer: aiohttp.ClientResponse, told: Told) -> None:
        seen = bytearray()
        async for part in answer.content.iter_any():
            if math.isnan(told.first) and _TEXT.search(part):
                told.first = time.monotonic()
            seen += part
        events = seen.decode().split("\n\n")
        if events[-2:] != ["data: [DONE]", ""]:
            told.error = "the stream ended without [DONE]"
        wanted = events if self._keep else events[-3:]
        for event in wanted:
            if not event.startswith("data: {"):
                continue
            found = json.loads(event.removeprefix("data: "))
            if "error" in found:
                told.error = found["error"]["message"]
            told.usage = found.get("usage") or told.usage
            if self._keep:
                told.objects.append(found)

    async def all(self, bodies: Iterable[dict[str, Any]], *, streams: int) -> list[Told]:
        """Each body once, `streams` of them at any time."""
        left = iter(bodies)
        found: list[Told] = []

        async def work() -> None:
            for body in left:
                found.append(await self.ask(body))

        await asyncio.gather(*(work() for _ in range(streams)))
        return found


@asynccontextmanager
async def client(url: str, *, timeout_s: float, keep: bool = False) -> AsyncIterator[Client]:
    """A client with as many connections as it needs; a request ends after `timeout_s`."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(session, url, keep=keep)


def chat(text: str, *, tokens: int, stream: bool = True, **more: Any) -> dict[str, Any]:
    """A request for exactly `tokens` tokens, the likeliest each time."""
    body = {
        "model": "policy",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if stream else {}) | more


def question(number: int) -> str:
    """A prompt of its own for each number, so that no prefix of one is cached by another."""
    return f"{number}. Tell me something about {_TOPICS[number % len(_TOPICS)]}."


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that is at least as large as `share` of all; nan where there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
