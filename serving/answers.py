"""The newest answers by their ids: what feedback can be given on."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """An answer as it was given. `texts` has one entry a choice, and so has `prompts`, the prompt of each."""

    prompts: list[str]
    messages: list[dict[str, str]] | None
    texts: list[str]
    version: int
    caller: str
    sampling: dict[str, Any] = field(default_factory=dict)


class Answers:
    """At most `kept` of them; the oldest leaves first.

    >>> answers = Answers(kept=1)
    >>> for name in ("a", "b"):
    ...     answers.add(name, Answer(["1 + 1?"], None, ["2"], 0, "anna"))
    >>> answers.get("a"), answers.get("b").texts
    (None, ['2'])
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._answers: OrderedDict[str, Answer] = OrderedDict()

    def add(self, answer_id: str, answer: Answer) -> None:
        self._answers[answer_id] = answer
        while len(self._answers) > self._kept:
            self._answers.popitem(last=False)

    def get(self, answer_id: str) -> Answer | None:
        return self._answers.get(answer_id)
