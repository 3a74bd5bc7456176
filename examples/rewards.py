"""Reward functions: `module:function` in a configuration. They get lists and return one float a response.

Columns of the prompt file arrive by name: a function that takes `answer` gets the `answer` column. What raises or
is not finite puts that one trajectory into quarantine.jsonl with the reason.
"""

from __future__ import annotations

import re
from typing import Any


def exact_answer(prompts: list[str], responses: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the last number of the response is the prompt file's `answer`, else 0."""
    return [
        float(_last_number(response) == str(wanted).strip()) for response, wanted in zip(responses, answer, strict=True)
    ]


def ends_cleanly(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """1 for a response that ends with punctuation: a small cost against being cut off."""
    return [float(response.rstrip().endswith((".", "!", "?"))) for response in responses]


def _last_number(text: str) -> str:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return numbers[-1] if numbers else ""
