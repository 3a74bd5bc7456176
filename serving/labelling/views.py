"""What annotators see of tasks and receipts, and what they say in terms of what they saw.

The page knows a left and a right response, never a and b: who wrote which is in the receipt, after the vote.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from feedback.store import Assignment, Judgment, Progress, Receipt, Refused

PAGE = Path(__file__).parent / "page"
COMMON_CSS = Path(__file__).parents[1] / "pages" / "common.css"
_WORDS = re.compile(r"[^\W_]+")


class Vote(BaseModel):
    """A judgment as the page sends it: of sides, not of a and b."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    task_id: str
    lease_id: str
    idempotency_key: str
    choice: str | None = None
    value: float | None = None
    strength: int | None = None
    aspects: dict[str, str | float] = {}
    rationale: str = ""
    active_s: float | None = None
    client_version: str = ""
    guideline_version: str = ""

    def judgment(self, left: Literal["a", "b"] | None) -> Judgment:
        """In the store's terms. Raises Refused (bad_choice)."""
        said = self.model_dump(exclude={"task_id", "lease_id"})
        said["choice"] = self.choice and _unsided("choice", self.choice, left)
        said["aspects"] = {
            name: _unsided(f"aspect {name}", value, left) if isinstance(value, str) else value
            for name, value in self.aspects.items()
        }
        return Judgment(**said)


def _unsided(name: str, said: str, left: Literal["a", "b"] | None) -> str:
    sides = {"left": left, "right": "b" if left == "a" else "a"} if left else {}
    allowed = {**sides, "tie": "tie", "both_bad": "both_bad", "skip": "skip"} if left else {"skip": "skip"}
    meant = allowed.get(said)
    if meant is None:
        raise Refused("bad_choice", f"{name} is {said!r:.60}, allowed is {', '.join(allowed)}")
    return meant


def task(given: Assignment, offensive: frozenset[str]) -> dict[str, Any]:
    """A task as JSON: texts by side, and whether each should be blurred at first."""
    texts = [given.response_a, given.response_b]
    left, right = texts[::-1] if given.left == "b" else texts
    written = " ".join(message["content"] for message in given.messages) if given.messages else given.prompt
    return {
        "task_id": given.task_id,
        "lease_id": given.lease_id,
        "kind": given.kind,
        "scale": given.scale,
        "deadline_s": given.deadline_s,
        "prompt": {"text": given.prompt, "messages": given.messages, "offensive": is_offensive(written, offensive)},
        "responses": [
            {"text": text, "offensive": is_offensive(text, offensive)} for text in (left, right) if text is not None
        ],
    }


def receipt(given: Receipt, left: Literal["a", "b"] | None, *, skipped: bool) -> dict[str, Any]:
    """What is on disk, and which weights wrote what was shown, in the order of the task's responses.

    After a skip `weights_versions` is null: who wrote what stays hidden until there is a vote.
    """
    versions = [given.weights_version_a, given.weights_version_b]
    shown = versions[:1] if left is None else versions[::-1] if left == "b" else versions
    return {
        "judgment_id": given.judgment_id,
        "task_id": given.task_id,
        "repeated": given.repeated,
        "weights_versions": None if skipped else shown,
    }


def progress(of: Progress) -> dict[str, int]:
    return asdict(of)


def guidelines(path: Path | None) -> dict[str, str]:
    """The text, and a version that follows from it: each vote says which one the annotator had before them."""
    text = (path or PAGE / "guidelines.txt").read_text(encoding="utf-8")
    return {"text": text, "version": hashlib.sha256(text.encode()).hexdigest()[:12]}


def offensive_words(path: Path | None) -> frozenset[str]:
    """Of the file, or what most people would not want to meet unasked, in English."""
    text = (path or Path(__file__).parent / "offensive.txt").read_text(encoding="utf-8")
    return frozenset(text.casefold().split())


def is_offensive(text: str, words: frozenset[str]) -> bool:
    return any(word in words for word in _WORDS.findall(text.casefold()))
