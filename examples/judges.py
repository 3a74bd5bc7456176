"""Two Python reward functions: what `rewards: - function: module:name` and `simulate.gold` expect.

A reward function gets the users' texts and the responses, one of each a sample, and every extra column of the
prompt file as a list by keyword. It returns one finite float a response; higher is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

BREVITY_FREE_WORDS = 40


def vader(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Sentiment of each response in [-1, 1], 0 for an empty one: VADER's compound score.

    Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
    """
    return [float(_analyzer().polarity_scores(response)["compound"]) for response in responses]


def brevity(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Short answers, as a reward in [0, 1]: 1 up to 40 words, then 40 / words; 0 for an empty response."""
    counts = [len(response.split()) for response in responses]
    return [min(1.0, BREVITY_FREE_WORDS / count) if count else 0.0 for count in counts]


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()  # reads a lexicon of 7,500 words: once a process
