"""Pairs of the live policy: two responses to one prompt, asked for over HTTP while people label."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from itertools import cycle
from typing import Any

from actors.prompts import PromptRow, read_rows
from contracts.events import Event, first_line
from contracts.labelling import LivePolicy
from contracts.waiting import NoAnswer, answer
from feedback.store import Candidate, Refused, Store, Written

LOOK_S = 2.0
LONGEST_PAUSE_S = 30.0
_MARGIN_S = 5.0  # the answer's own time-out comes first, and says more


class LivePairs:
    """Keeps at least `policy.ahead` tasks open, with responses of whatever version is served then.

    Consumes prompts in the order of their file, again and again. Waits for the application, `answer_s` for each pair;
    where it does not answer, says so once, and asks again after growing pauses, 30 s at most, until it does.
    """

    def __init__(
        self,
        policy: LivePolicy,
        store: Store,
        *,
        required_votes: int,
        on_event: Callable[[Event], None],
        pause_s: float = LOOK_S,
    ) -> None:
        """Raises ConfigError where the prompts cannot be read."""
        self._policy, self._store, self._required_votes = policy, store, required_votes
        self._prompts = cycle(read_rows(policy.prompts))
        self._on_event, self._pause_s = on_event, pause_s
        self.added = 0

    async def keep_open(self) -> None:
        """Until `max_pairs` have been added, or for ever."""
        most, pause_s, name = self._policy.max_pairs, self._pause_s, ""
        while most is None or self.added < most:
            open_tasks = (await asyncio.to_thread(self._store.totals)).open_tasks
            if open_tasks >= self._policy.ahead:
                await asyncio.sleep(self._pause_s)
                continue
            try:
                name = name or await self._ask("/v1/models", None, _model_name)
                added = await self._add(next(self._prompts), name)
            except (OSError, NoAnswer, BadAnswer, Refused) as error:
                if pause_s == self._pause_s:
                    consequence = "people label what there is; it is asked again until it answers"
                    self._on_event(
                        Event("pending", f"the policy at {self._policy.url}", first_line(error), consequence)
                    )
                added, name = False, ""
            pause_s = self._pause_s if added else min(2 * pause_s, LONGEST_PAUSE_S)
            if not added:
                await asyncio.sleep(pause_s)

    async def _add(self, prompt: PromptRow, name: str) -> bool:
        """Whether there is a task more: equal responses are none."""
        policy = self._policy
        sampling = {"temperature": policy.temperature, "max_tokens": policy.max_response_tokens}
        body = {"model": name, "messages": prompt.messages, "n": 2, **sampling}
        first, second = await self._ask("/v1/chat/completions", body, lambda said: _both(said, sampling))
        pair = Candidate(
            prompt.text, first, second, "live", prompt_name=prompt.prompt_id, domain=prompt.domain,
            messages=prompt.messages if len(prompt.messages) > 1 else None,
        )  # fmt: skip
        add = self._store.add_candidates
        report = await asyncio.to_thread(add, [pair], required_votes=self._required_votes)
        self.added += report.kept
        return report.kept > 0

    async def _ask(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Any]) -> Any:
        timeout_s = self._policy.answer_s
        asked = asyncio.to_thread(_request, f"{self._policy.url.rstrip('/')}{path}", body, timeout_s=timeout_s)
        said = await answer(asked, who=self._policy.url, asked="answer", deadline_s=timeout_s + _MARGIN_S)
        try:
            return read(said)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadAnswer(
                f"{path} answered something else than an OpenAI-compatible API does: {said!r:.80}"
            ) from error


class BadAnswer(ValueError):
    """An application that answers, but not what was asked."""


def _request(url: str, body: dict[str, Any] | None, *, timeout_s: float) -> Any:
    key = os.environ.get("HEADRACE_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            said = " ".join(error.read(300).decode("utf-8", "replace").split())
        raise BadAnswer(f"{error.code} {error.reason}: {said}") from error
    except ValueError as error:
        raise BadAnswer(f"{url} answered no JSON: {error}") from error


def _model_name(said: Any) -> str:
    return str(said["data"][0]["id"])


def _both(said: Any, sampling: dict[str, Any]) -> tuple[Written, Written]:
    """The two responses; other applications than ours do not say which weights wrote them."""
    texts = [choice["message"]["content"] for choice in said["choices"]]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a response without text")
    first, second = (Written(text, said.get("weights_version"), sampling) for text in texts)
    return first, second
