"""Preference files (`prompt`, `chosen`, `rejected`) and unpaired ones (`prompt`, `completion`, `label`), as TRL and
others write them: Parquet, JSON lines, Hugging Face datasets folders.

Read are
- plain rows: three strings, kept as they are;
- conversational rows: lists of {role, content}. The response is the last, assistant message of `chosen` and
  `rejected`; what comes before (in `prompt`, in both sides, or in both places) is the prompt;
- rows without `prompt`: conversational ones, or dialogues "\n\nHuman: ...\n\nAssistant: ..." as in HH-RLHF
  (Bai et al. 2022); the turns that both sides share are the prompt.
A dialogue becomes prompt text as feedback.dialogues says; written conversational, it becomes the turns again.
Optional columns: prompt_id (default: a hash of the prompt), domain, probability, votes_chosen, votes_rejected;
unpaired: prompt_id, domain, votes, of_votes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa

from contracts.config import ConfigError
from contracts.records import COMPARISON_SCHEMA, SCHEMA_VERSION, Comparison
from feedback.dialogues import prompt_turns, text_of, texts_of
from feedback.exports import write_rows
from feedback.quality import UnpairedLabel
from feedback.rows import file_rows

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

UNPAIRED_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("label", pa.bool_()),
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("votes", pa.int32()),
        ("of_votes", pa.int32()),
    ],
    metadata={"headrace_schema_version": str(SCHEMA_VERSION)},
)

Layout = Literal["plain", "conversational"]
Truncate = Callable[[str], str]  # what a reader of limited length sees of a response
Judged = TypeVar("Judged", bound="Comparison | UnpairedLabel")


def write_preferences(comparisons: Iterable[Comparison], path: Path | str, *, layout: Layout = "plain") -> None:
    """Write one row a comparison, in the format that the ending of `path` says (`exports.write_rows`).

    The file appears complete or not at all; folders are made.
    """
    rows = (_laid_out(asdict(comparison), ("chosen", "rejected"), layout) for comparison in comparisons)
    write_rows(rows, _schema(COMPARISON_SCHEMA, ("prompt", "chosen", "rejected"), layout), Path(path))


def write_unpaired(labels: Iterable[UnpairedLabel], path: Path | str, *, layout: Layout = "plain") -> None:
    """The same for labels of single responses: `prompt`, `completion`, `label` (true: good)."""
    rows = (
        _laid_out(
            {
                "prompt": label.prompt,
                "completion": label.response,
                "label": label.good,
                "prompt_id": label.prompt_id,
                "domain": label.domain,
                "votes": label.votes,
                "of_votes": label.of_votes,
            },
            ("completion",),
            layout,
        )
        for label in labels
    )
    write_rows(rows, _schema(UNPAIRED_SCHEMA, ("prompt", "completion"), layout), Path(path))


def read_preferences(path: Path | str, *, truncate: Truncate | None = None) -> tuple[list[Comparison], dict[str, int]]:
    """Read `.parquet`, `.jsonl`, `.jsonl.gz` or a datasets folder, in the formats above; the order of rows is kept.

    Returns:
        The comparisons, and how many rows were left out by reason: "identical" (responses equal but for outer
        white space), "identical after truncation" (what `truncate` leaves of them is), "empty" (a blank prompt or
        response), "different prompts" (the sides answer different dialogues), "no response" (a dialogue that does
        not end with the assistant). Comparisons and left-out rows add up to the rows of the file. A probability of 0.5
        stays: nobody knows which is better, and a soft target says so.

    Raises:
        ConfigError: a file that cannot be read, a missing column, a malformed row. The message begins with
            FILE:LINE, counted from 1; in Parquet the line is the row.
    """
    dropped: Counter[str] = Counter()
    return list(stream_preferences(Path(path), dropped, truncate=truncate)), dict(dropped)


def stream_preferences(path: Path, dropped: Counter[str], *, truncate: Truncate | None = None) -> Iterator[Comparison]:
    """`read_preferences` a row at a time; what is left out is counted in `dropped` on the way."""
    for where, row in file_rows(path, ("chosen", "rejected")):
        comparison, reason = _comparison(row, where)
        reason = reason or _unusable(comparison, truncate)
        if reason:
            dropped[reason] += 1
        else:
            yield comparison


def read_unpaired(path: Path | str, *, truncate: Truncate | None = None) -> tuple[list[UnpairedLabel], dict[str, int]]:
    """Labels of single responses. Left out are "empty" rows and those that are "no response".

    Raises:
        ConfigError: as `read_preferences`; also a label that is neither true nor false (0 and 1 will do).
    """
    dropped: Counter[str] = Counter()
    return list(stream_unpaired(Path(path), dropped, truncate=truncate)), dict(dropped)


def stream_unpaired(path: Path, dropped: Counter[str], *, truncate: Truncate | None = None) -> Iterator[UnpairedLabel]:
    """`read_unpaired` a row at a time; "empty after truncation" is a reason too."""
    for where, row in file_rows(path, ("completion", "label")):
        label, reason = _unpaired(row, where)
        if not reason and not (label.prompt.strip() and label.response.strip()):
            reason = "empty"
        if not reason and truncate and not truncate(label.response).strip():
            reason = "empty after truncation"
        if reason:
            dropped[reason] += 1
        else:
            yield label


def stream_pairs(path: Path, dropped: Counter[str], *, truncate: Truncate | None = None) -> Iterator[Comparison]:
    """Pairs that people are to compare: `response_a` and `response_b`, or `chosen` and `rejected` of a preference file.

    What becomes `chosen` is the first of the two; nothing says that it is better.
    """
    for where, row in file_rows(path, ()):
        both = [name for name in ("response_a", "response_b") if row.get(name) is not None]
        if len(both) == 1:
            raise ConfigError(f"{where}: there is {both[0]} but not the other response of the pair")
        if both:
            row = {**row, "chosen": row["response_a"], "rejected": row["response_b"], "probability": None}
        comparison, reason = _comparison(row, where)
        reason = reason or _unusable(comparison, truncate)
        if reason:
            dropped[reason] += 1
        else:
            yield comparison


def split_by_prompt(comparisons: Sequence[Judged], fraction: float, *, seed: int) -> tuple[list[Judged], list[Judged]]:
    """(train, held_out): about `fraction` of the prompts are held out, with all their rows.

    Rows with one prompt id or one prompt text (but for outer white space) stay together. Prompts are ranked by a
    hash of seed and text, so the order of rows does not matter; both sides keep it.

    Raises:
        ValueError: fewer than two prompts, or a fraction that is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, allowed is more than 0 and less than 1")
    groups = _prompt_groups(comparisons)
    ranked = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    if len(ranked) < 2:
        raise ValueError(f"{len(comparisons)} comparisons over {len(ranked)} prompts: a split needs two prompts")
    count = min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)
    held_out = set(ranked[:count])
    return (
        [row for row, group in zip(comparisons, groups, strict=True) if group not in held_out],
        [row for row, group in zip(comparisons, groups, strict=True) if group in held_out],
    )


def _prompt_groups(comparisons: Sequence[Judged]) -> list[str]:
    """The group of every row: union-find over prompt texts and ids, named by the least text in it."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            parents[key] = key = parents[parents[key]]
        return key

    texts = [f"text {row.prompt.strip()}" for row in comparisons]
    for row, text in zip(comparisons, texts, strict=True):
        if row.prompt_id:
            one, other = root(text), root(f"id {row.prompt_id}")
            # an id never leads a group: the ranking must not change where ids do
            parents[one] = parents[other] = min(key for key in (one, other) if key.startswith("text "))
    return [root(text) for text in texts]


def _schema(plain: pa.Schema, texts: tuple[str, ...], layout: Layout) -> pa.Schema:
    if layout == "plain":
        return plain
    if layout != "conversational":
        raise ValueError(f"layout is {layout!r}, allowed is plain or conversational")
    fields = [pa.field(field.name, _MESSAGES if field.name in texts else field.type) for field in plain]
    return pa.schema(fields, metadata=plain.metadata)


def _laid_out(row: dict[str, Any], responses: tuple[str, ...], layout: Layout) -> dict[str, Any]:
    if layout == "conversational":
        row["prompt"] = [{"role": role, "content": text} for role, text in prompt_turns(row["prompt"])]
        for name in responses:
            row[name] = [{"role": "assistant", "content": row[name]}]
    return row


def _comparison(row: Mapping[str, Any], where: str) -> tuple[Comparison, str]:
    """The comparison, and why it cannot be used ("" where it can)."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            there = sorted(key for key, value in row.items() if value is not None)
            raise ConfigError(f"{where}: {name!r} is missing, there are: {', '.join(there)}")
    prompt, chosen, rejected, reason = texts_of(row, where)
    comparison = Comparison(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        prompt_id=_optional_text(row, "prompt_id", where) or hashlib.sha256(prompt.strip().encode()).hexdigest()[:16],
        domain=_optional_text(row, "domain", where),
        probability=_probability(row.get("probability"), where),
        votes_chosen=_count(row, "votes_chosen", where),
        votes_rejected=_count(row, "votes_rejected", where),
    )
    return comparison, reason


def _unpaired(row: Mapping[str, Any], where: str) -> tuple[UnpairedLabel, str]:
    """The label, and why it cannot be used ("" where it can)."""
    for name in ("completion", "label"):
        if row.get(name) is None:
            there = sorted(key for key, value in row.items() if value is not None)
            raise ConfigError(f"{where}: {name!r} is missing, there are: {', '.join(there)}")
    if row["label"] not in (0, 1) or not isinstance(row["label"], int):
        raise ConfigError(f"{where}: 'label' is {row['label']!r:.60}, allowed is true or false")
    # one completion is read as the two sides of a comparison are
    prompt, response, _, reason = texts_of({**row, "chosen": row["completion"], "rejected": row["completion"]}, where)
    votes, of_votes = (_count(row, name, where) for name in ("votes", "of_votes"))
    prompt_id = _optional_text(row, "prompt_id", where) or hashlib.sha256(prompt.strip().encode()).hexdigest()[:16]
    if votes > of_votes:
        raise ConfigError(f"{where}: votes is {votes}, allowed is at most of_votes, {of_votes}")
    domain = _optional_text(row, "domain", where)
    return UnpairedLabel(prompt, response, bool(row["label"]), prompt_id, votes, of_votes, domain), reason


def _unusable(comparison: Comparison, truncate: Truncate | None) -> str:
    if not (comparison.prompt.strip() and comparison.chosen.strip() and comparison.rejected.strip()):
        return "empty"
    if comparison.chosen.strip() == comparison.rejected.strip():
        return "identical"
    if truncate and truncate(comparison.chosen).strip() == truncate(comparison.rejected).strip():
        return "identical after truncation"
    return ""


def _optional_text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # ids are often numbers
    return "" if value is None else text_of(value, name, where)


def _probability(value: Any, where: str) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.5 <= value <= 1:
        raise ConfigError(
            f"{where}: probability is {value!r}, allowed is 0.5 to 1: how surely chosen is better than rejected"
        )
    return float(value)


def _count(row: Mapping[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{where}: {name} is {value!r}, allowed is a count of votes")
    return value
