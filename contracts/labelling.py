"""Settings of the labelling page: which store, what people are asked, for how long a task is theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from contracts.section import Fraction, Positive, PositiveInt, Section


class LabellingConfig(Section):
    """The page and API at which annotators label, on Ray Serve."""

    store: str = Field(description="file or URL of the feedback store")
    kinds: tuple[Literal["pair", "label", "rating"], ...] = Field(
        default=("pair", "label", "rating"), min_length=1, description="tasks that are given out here"
    )
    lease_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        default=900.0, description="a task is kept for whoever got it; the page renews it while they work"
    )
    gold_rate: Fraction = Field(default=0.1, description="share of tasks that are checks with a known answer")
    aspects: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        default=("helpful", "harmless"),
        max_length=16,
        description="asked beside which response is better, if they like",
    )
    guidelines: Path | None = Field(default=None, description="text file that annotators read; default: a short one")
    offensive_words: Path | None = Field(
        default=None, description="text with one of these words (one a line) is blurred at first; default: a short list"
    )
    request_s: Positive = Field(default=60.0, description="one request, waiting for other writers included")
    max_body_bytes: PositiveInt = 1 << 18
