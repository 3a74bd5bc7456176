"""The gate's engine: samples the fixed prompts with two versions, has them scored, and says which may follow which.

It consumes candidates from the version keeper, one at a time, each with the weights that lead there. It waits for the
weights, for its engine and for the reward's components, each with a deadline; whatever fails is an error of the
keeper's call, which promotes nothing and asks again. Ray Serve replaces it when `check_health` raises; it starts again
from what replicas start with, and keeps nothing but the measurements of the version that it would compare with next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import AutoTokenizer

from contracts.records import Prompt
from contracts.seeds import derive_seed
from contracts.serving import ServingConfig
from contracts.waiting import answer
from models.engine import Engine
from models.engine_core import CoreWatch
from models.engine_scoring import response_logprobs
from models.weight_stream import DeltaError
from serving.gate import Sampled, compare
from serving.records import StartWeights, Step, Verdict
from serving.replica import SILENT_S, start_engine
from serving.taking import KEEPER, Taking

_FETCH_S = 120.0
_EXCHANGE_S = 180.0
_SAMPLE_S = 600.0  # all prompts; the keeper waits half an hour for everything
_LOGPROBS_S = 300.0
_SCORE_S = 300.0
_WHO = "the gate's engine"


class RewardScorer(Protocol):
    """A component of the reward: (messages, response, the prompt's columns) -> (score, version). To be pickled.

    Raises ValueError for what it cannot score.
    """

    def __call__(
        self, messages: list[dict[str, str]], response: str, columns: Mapping[str, Any] | None = None
    ) -> Awaitable[tuple[float, str]]: ...


@dataclass(frozen=True)
class GateSettings:
    """What the gate is started with: `scorers` are the reward's components with their weights, `key` is the frames'."""

    config: ServingConfig
    start: StartWeights
    max_context_tokens: int
    prompts: tuple[Prompt, ...]
    scorers: Mapping[str, tuple[float, RewardScorer]]
    start_s: float
    key: bytes | None = None


class GateEngine:
    """The deployment `gate`: one replica, one call at a time.

    Prompts have the same seeds each time, so that two versions that do not differ say the same.

    Raises:
        ValueError: there are no prompts, or no component of a reward.
    """

    async def __init__(self, settings: GateSettings) -> None:  # type: ignore[misc]
        if settings.config.gate is None or not settings.prompts or not settings.scorers:
            raise ValueError("a gate needs serving.gate, prompts and a reward: without them nothing can be compared")
        self._settings, self._limits = settings, settings.config.gate
        self._engine: Engine = await start_engine(
            settings.config, settings.start, max_context_tokens=settings.max_context_tokens, start_s=settings.start_s
        )
        self._core = CoreWatch(self._engine.ping, self._engine.core_computed_s)
        self._taking = await Taking.into(self._engine, settings.key)
        self._tokenizer: Any = await asyncio.to_thread(AutoTokenizer.from_pretrained, settings.start.path)
        self._measured: Sampled | None = None
        self._num_requests = 0

    async def holds(self) -> tuple[int | None, int | None]:
        """The version that its engine holds (None: it needs a keyframe), and the one whose measurements it has."""
        return self._taking.held, self._measured.version if self._measured else None

    async def judge(self, current: int, to_current: list[Step], candidate: int, to_candidate: list[Step]) -> Verdict:
        """Whether `candidate` may follow `current`.

        Args:
            to_current: what leads there from what it holds; empty where it holds or has measured that version.
            to_candidate: what leads on from there.

        Raises:
            NoAnswer: weights, the engine or a component of the reward did not come in time.
            RuntimeError: the weights were refused; the next ones have to begin with a keyframe.
            ValueError: no response of the current version can be scored.
        """
        if self._measured is None or self._measured.version != current:
            self._measured = None
            await self._take(current, to_current)
            self._measured = await self._measure(current)
        before = self._measured
        await self._take(candidate, to_candidate)
        after = await self._measure(candidate)
        under_candidate = await self._logprobs(before.responses)
        weights = {name: weight for name, (weight, _) in self._settings.scorers.items()}
        try:
            verdict = compare(before, after, under_candidate, weights, self._limits)
        except ValueError:
            self._measured = None  # a reward that fails now may not fail the next time
            raise
        if verdict.promote:
            self._measured = after
        return verdict

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises three times in a row."""
        if self._engine.broken:
            raise RuntimeError(f"{_WHO} is broken: {self._engine.broken}")
        self._core.look()
        if self._core.idle_s > SILENT_S:
            raise RuntimeError(f"{_WHO}: its core has stood still for {self._core.idle_s:.0f} s")

    def __del__(self) -> None:
        if "_engine" in vars(self):
            self._engine.shutdown()

    async def _take(self, version: int, steps: Sequence[Step]) -> None:
        if steps:
            fetch = asyncio.gather(*(asyncio.gather(*frames) for _, frames in steps))
            frames = await answer(fetch, who=KEEPER, asked=f"hand over version {version}", deadline_s=_FETCH_S)
            updates = [update for update, _ in steps]
            try:
                await self._taking.take(version, updates, frames, deadline_s=_EXCHANGE_S)
            except DeltaError as error:
                self._taking.forget()
                raise RuntimeError(str(error)) from None
        if self._engine.version != version:
            raise RuntimeError(f"{_WHO} serves version {self._engine.version}, asked for version {version}")

    async def _measure(self, version: int) -> Sampled:
        generate = asyncio.gather(*(self._response(index) for index in range(len(self._settings.prompts))))
        asked = f"sample {len(self._settings.prompts)} responses of version {version}"
        responses = await answer(generate, who=_WHO, asked=asked, deadline_s=_SAMPLE_S)
        score = asyncio.gather(*(self._reward(*each) for each in zip(self._settings.prompts, responses, strict=True)))
        # By the same forward pass as under the other version: how decoding rounds is no difference between them.
        logprobs, rewards = await asyncio.gather(
            self._logprobs(responses), answer(score, who="the reward", asked="score responses", deadline_s=_SCORE_S)
        )
        return Sampled(version, responses, logprobs, rewards)

    async def _response(self, index: int) -> list[int]:
        prompt = self._settings.prompts[index]
        generation = await self._engine.generate(
            prompt.tokens,
            request_id=self._request_id(),
            max_tokens=self._limits.max_response_tokens,
            temperature=1.0,
            seed=derive_seed(0, "gate", prompt.prompt_id),
        )
        return generation.response_tokens

    async def _logprobs(self, responses: Sequence[list[int]]) -> list[list[float]]:
        """Of each prompt's response, under the version that the engine serves."""
        ask = asyncio.gather(
            *(
                response_logprobs(self._engine, prompt.tokens, response, request_id=self._request_id())
                for prompt, response in zip(self._settings.prompts, responses, strict=True)
            )
        )
        asked = f"give log-probabilities of {len(responses)} responses"
        return await answer(ask, who=_WHO, asked=asked, deadline_s=_LOGPROBS_S)

    async def _reward(self, prompt: Prompt, response: list[int]) -> dict[str, float] | str:
        """Each component's score by name, or why the response cannot be scored."""
        text = str(self._tokenizer.decode(response, skip_special_tokens=True))
        asked = (scorer(list(prompt.messages), text, prompt.columns) for _, scorer in self._settings.scorers.values())
        try:
            scores = await asyncio.gather(*asked)
        except ValueError as error:
            return str(error)
        return {name: value for name, (value, _) in zip(self._settings.scorers, scores, strict=True)}

    def _request_id(self) -> str:
        self._num_requests += 1
        return f"gate-{self._num_requests}"
