"""Settings of `headrace label`: the store, what people are asked and where it comes from, for how long it is theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from contracts.section import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt, Section


class LivePolicy(Section):
    """A policy that `headrace serve` or another OpenAI-compatible API answers for; HEADRACE_API_KEY is sent, if set."""

    url: str = Field(pattern=r"^https?://", description="of the application, for example http://127.0.0.1:8000")
    prompts: Path = Field(description="prompt file, JSONL or Parquet, as in prompts.path; begun again at its end")
    ahead: PositiveInt = Field(default=20, description="open tasks to keep: new pairs are sampled when there are fewer")
    max_pairs: PositiveInt | None = Field(default=None, description="in all, in one session; default: no end")
    max_response_tokens: PositiveInt = 256
    temperature: NonNegative = 1.0
    answer_s: Positive = Field(default=120.0, description="two responses")


class PairSource(Section):
    """Where pairs of responses come from: exactly one of these."""

    file: Path | None = Field(
        default=None,
        description="`prompt` with `chosen` and `rejected` or with `response_a` and `response_b`; .parquet, .jsonl",
    )
    run: Path | None = Field(default=None, description="folder of a run: its responses to one prompt, from experience/")
    evaluations: tuple[Path, Path] | None = Field(
        default=None, description="two files of `headrace eval --output`, of two checkpoints on the same prompts"
    )
    policy: LivePolicy | None = None
    steps: PositiveInt = Field(default=20, description="with run: its newest steps")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("file", "run", "evaluations", "policy") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"there are {' and '.join(given)}" if given else "there is none"
            raise ValueError(f"give exactly one of file, run, evaluations and policy; {said}")
        return self


class LabellingConfig(Section):
    """The page and API at which annotators label, on Ray Serve."""

    store: str = Field(min_length=1, description="file or URL of the feedback store")
    host: str = Field(default="127.0.0.1", description="every annotator needs a token, whatever the address is")
    port: Annotated[int, Field(ge=1, le=65535)] = 8001
    pairs: tuple[PairSource, ...] = Field(default=(), description="what becomes tasks; default: what the store holds")
    required_votes: PositiveInt = Field(default=3, description="of different people, for each pair")
    gold: Path | None = Field(
        default=None, description="preference file whose `chosen` is known to be better: checks of annotators"
    )
    gold_rate: Fraction = Field(default=0.1, description="share of tasks that are checks with a known answer")
    asking: Literal["as_given", "random", "varied", "to_predict"] = Field(
        default="random",
        description="which pair comes next: in the order of the source, by lot, the least alike, or those whose labels "
        "together tell a model of the texts most about the others",
    )
    near_duplicates: PositiveInt | None = Field(
        default=None, description="of pairs much like each other, so many become tasks; default: all"
    )
    kinds: tuple[Literal["pair", "label", "rating"], ...] = Field(
        default=("pair", "label", "rating"), min_length=1, description="tasks that are given out here"
    )
    lease_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        default=900.0, description="a task is kept for whoever got it; the page renews it while they work"
    )
    aspects: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        default=("helpful", "harmless"),
        max_length=16,
        description="asked beside which response is better, if they like",
    )
    guidelines: Path | None = Field(default=None, description="text file that annotators read; default: a short one")
    offensive_words: Path | None = Field(
        default=None, description="text with one of these words (one a line) is blurred at first; default: a short list"
    )
    seed: NonNegativeInt = Field(default=0, description="of `asking: random`")
    request_s: Positive = Field(default=60.0, description="one request, waiting for other writers included")
    max_body_bytes: PositiveInt = 1 << 18
