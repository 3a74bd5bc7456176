"""Reward functions for tests: the columns `do` and `number` of a prompt say how to behave."""

import math
import os
import time
from collections.abc import Sequence


def behave(prompts: Sequence[str], responses: Sequence[str], do: Sequence[str], number: Sequence[float]) -> list[float]:
    return [_one(action, value, len(responses)) for action, value in zip(do, number, strict=True)]


def _one(action: str, value: float, batch_size: int) -> float:
    if action == "raise":
        raise ValueError("no taste")
    if action == "sleep":
        time.sleep(value)
    if action == "spin":  # all the time in Python
        expires = time.monotonic() + value
        while time.monotonic() < expires:
            pass
    return {"nan": math.nan, "batch size": batch_size, "process": os.getpid()}.get(action, value)


def length(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
    return [float(len(response)) for response in responses]
