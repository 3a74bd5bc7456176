"""What goes into the store and comes out of it, and why something is refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from feedback.ballots import CHOICES

TaskKind = Literal["pair", "label", "rating", "thumbs", "correction"]
Source = Literal["live", "versions", "file"]  # the live policy, two of its versions, a file
Code = Literal[
    "unknown_annotator",
    "unknown_prompt",
    "unknown_response",
    "unknown_task",
    "unknown_judgment",
    "unknown_aggregate",
    "no_lease",  # none on that task, or somebody else's
    "lease_expired",
    "lease_ended",  # it was used or given back
    "already_voted",
    "already_undone",
    "key_reused",  # an idempotency key that stands for something else
    "bad_choice",
    "bad_value",
    "bad_time",
    "bad_text",
    "bad_task",
    "name_taken",
    "busy",  # others wrote for longer than busy_s: try again
    "not_a_store",
    "schema",  # of another version of Headrace
]
VALUES = ("label", "thumbs", "rating")  # kinds that a number answers
MAX_STRENGTH = 3
MAX_ASPECTS = 16
MAX_ACTIVE_S = 86_400.0
_MAX_CHARS = {"idempotency_key": 200, "rationale": 10_000, "client_version": 100, "guideline_version": 100}
MAX_TEXT_CHARS = 1_000_000
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class Refused(ValueError):
    """The store did not take it, and nothing of it was kept. `code` is for programs, the message for people."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


@dataclass(frozen=True)
class Judgment:
    """What somebody says about a task. A pair takes `choice`, labels and ratings `value`, a correction `text`.

    choice: one of CHOICES; every kind may be skipped.
    value: 0 or 1 for labels and thumbs, 1 to the task's scale for ratings.
    strength: 1 to 3, how much better, with a choice of a or b.
    aspects: by name, such as helpful: a choice for a pair, a value otherwise.
    active_s: seconds spent on it, never more than the lease is old.
    idempotency_key: the client's own; the same one again gives the same receipt.
    """

    idempotency_key: str
    choice: str | None = None
    value: float | None = None
    text: str | None = None
    strength: int | None = None
    aspects: dict[str, str | float] = field(default_factory=dict)
    rationale: str = ""
    active_s: float | None = None
    client_version: str = ""
    guideline_version: str = ""

    def digest(self, act: str) -> str:
        """Of all but the key, and of what was done with it: tells a repetition from another use of the key."""
        content = asdict(self) | {"act": act}
        del content["idempotency_key"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Written:
    """A response; where a policy wrote it, which weights and with which sampling settings."""

    text: str
    weights_version: int | None = None
    sampling: dict[str, Any] | None = None


@dataclass(frozen=True)
class Candidate:
    """Two responses to one prompt that people may be asked about. Which becomes a follows from hashes of the texts.

    prompt_name: what a file or a run calls the prompt.
    score: of tasks of equal priority the one with the higher score is asked first.
    """

    prompt: str
    first: Written
    second: Written
    source: Source
    prompt_name: str = ""
    domain: str = ""
    messages: list[dict[str, str]] | None = None
    score: float = 0.0


@dataclass(frozen=True)
class Assignment:
    """A task that an annotator may answer until `deadline_s` (seconds since 1970). Who wrote what stays hidden.

    left: which response is shown on the left, "a" or "b", drawn anew for each lease; None where there is but one.
    """

    lease_id: str
    task_id: str
    kind: TaskKind
    prompt: str
    messages: list[dict[str, str]] | None
    response_a: str
    response_b: str | None
    left: Literal["a", "b"] | None
    scale: int
    deadline_s: float


@dataclass(frozen=True)
class Receipt:
    """A judgment that is on disk. `repeated` where the same key had brought it before.

    weights_version_a and _b: what was hidden until now; None where the text came from a file, or there is no b.
    """

    judgment_id: int
    task_id: str
    repeated: bool
    weights_version_a: int | None
    weights_version_b: int | None


@dataclass(frozen=True)
class Progress:
    """Of one annotator, and of all: `votes` of `required_votes`, gold checks in neither."""

    voted: int
    skipped: int
    votes: int
    required_votes: int
    open_tasks: int


@dataclass(frozen=True)
class Totals:
    """Of all tasks that people are asked, gold checks aside."""

    votes: int
    required_votes: int
    open_tasks: int


@dataclass(frozen=True)
class Person:
    """An annotator. `votes` are standing judgments, skips and gold checks among them."""

    annotator_id: int
    name: str
    active: bool
    has_token: bool
    votes: int


@dataclass(frozen=True)
class Gap:
    """What a deleted annotator left behind: numbers."""

    gap_id: int
    judgments: int
    votes: int
    tasks: int
    deleted_s: float


@dataclass(frozen=True)
class AggregateRun:
    """One aggregation: of which judgments (up to an id), without which (gaps before it), by which method."""

    aggregate_id: int
    kind: str
    method: str
    version: str
    tasks: int
    judgments: int
    last_judgment_id: int
    gaps: int


@dataclass(frozen=True)
class ImportReport:
    """What an import kept, what was there already, and what it dropped by reason; they add up to the rows."""

    kept: int
    known: int
    dropped: dict[str, int]
    aggregate_id: int | None = None

    @property
    def rows(self) -> int:
        return self.kept + self.known + sum(self.dropped.values())


def check_text(name: str, value: Any, *, max_chars: int = MAX_TEXT_CHARS, blank: bool = True) -> str:
    """Text that every database takes.

    Raises:
        Refused: no text, too long, half a surrogate pair, a NUL (PostgreSQL has none), blank where it may not be.
    """
    if not isinstance(value, str):
        raise Refused("bad_text", f"{name} is {value!r:.60}, allowed is text")
    if len(value) > max_chars:
        raise Refused("bad_text", f"{name} has {len(value)} characters, allowed are {max_chars}")
    if _NO_TEXT.search(value):
        raise Refused("bad_text", f"{name} holds a NUL or half a surrogate pair, which is no text")
    if not (blank or value.strip()):
        raise Refused("bad_text", f"{name} is blank")
    return value


def check_judgment(judgment: Judgment, kind: str, scale: int) -> None:
    """That the judgment is possible for such a task; `active_s` is held against the lease elsewhere.

    Raises:
        Refused: bad_choice, bad_value, bad_time or bad_text.
    """
    for name, most in _MAX_CHARS.items():
        check_text(name, getattr(judgment, name), max_chars=most, blank=name != "idempotency_key")
    if judgment.choice == "skip":
        if (judgment.value, judgment.text, judgment.strength, judgment.aspects) != (None, None, None, {}):
            raise Refused("bad_choice", "a skip goes with no value, text, strength or aspects")
    else:
        _check_answer(judgment, kind, scale)
    seconds = judgment.active_s
    if seconds is not None and not (is_number(seconds) and 0 <= seconds <= MAX_ACTIVE_S):
        raise Refused("bad_time", f"active_s is {seconds!r:.60}, allowed is 0 to {MAX_ACTIVE_S:g}")


def _check_answer(judgment: Judgment, kind: str, scale: int) -> None:
    needed = "choice" if kind == "pair" else "text" if kind == "correction" else "value"
    for name in ("choice", "value", "text"):
        if (getattr(judgment, name) is not None) != (name == needed):
            code: Code = "bad_choice" if name == "choice" else "bad_value"
            raise Refused(code, f"a {kind} task takes {needed} alone, or the choice skip: {name} is wrong")
    if kind == "pair":
        _check_choice("choice", judgment.choice)
    elif kind == "correction":
        check_text("text", judgment.text, blank=False)
    else:
        _check_value("value", judgment.value, kind, scale)
    if judgment.strength is not None and (
        judgment.choice not in ("a", "b")
        or type(judgment.strength) is not int
        or not 1 <= judgment.strength <= MAX_STRENGTH
    ):
        raise Refused("bad_value", f"strength is {judgment.strength!r:.60}, allowed is 1 to {MAX_STRENGTH} with a or b")
    _check_aspects(judgment.aspects, kind, scale)


def _check_aspects(aspects: Any, kind: str, scale: int) -> None:
    if not isinstance(aspects, dict) or len(aspects) > MAX_ASPECTS:
        raise Refused("bad_value", f"aspects is {aspects!r:.60}, allowed is a mapping of at most {MAX_ASPECTS}")
    for name, value in aspects.items():
        check_text("the name of an aspect", name, max_chars=64, blank=False)
        if kind == "pair":
            _check_choice(f"aspect {name}", value)
        else:
            _check_value(f"aspect {name}", value, kind, scale)


def _check_choice(name: str, value: Any) -> None:
    if value not in CHOICES:
        raise Refused("bad_choice", f"{name} is {value!r:.60}, allowed is {', '.join(CHOICES)}")


def _check_value(name: str, value: Any, kind: str, scale: int) -> None:
    low, high = (1, scale) if kind == "rating" else (0, 1)
    if not is_number(value) or value != int(value) or not low <= value <= high:
        raise Refused("bad_value", f"{name} is {value!r:.60}, allowed is a whole number from {low} to {high}")


def is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**53
    return isinstance(value, float) and math.isfinite(value)


def check_kind(kind: str) -> None:
    if kind not in get_args(TaskKind):
        raise Refused("bad_task", f"kind is {kind!r:.60}, allowed is {', '.join(get_args(TaskKind))}")


def check_gold(gold: str | None, kind: str, scale: int) -> None:
    """A gold answer is kept as text: a choice, or a number."""
    if gold is None:
        return
    if kind == "pair":
        if gold == "skip" or gold not in CHOICES:
            raise Refused("bad_task", f"gold is {gold!r:.60}, allowed is {', '.join(CHOICES[:-1])}")
    elif kind in VALUES:
        low, high = (1, scale) if kind == "rating" else (0, 1)
        if gold not in {str(value) for value in range(low, high + 1)}:
            raise Refused("bad_task", f"gold is {gold!r:.60}, allowed is a whole number from {low} to {high}, as text")
    else:
        raise Refused("bad_task", f"a {kind} task has no gold answer")
