"""Preference files (`prompt`, `chosen`, `rejected`) and unpaired ones (`prompt`, `completion`, `label`), as TRL and
others write them: Parquet, JSON lines, Hugging Face datasets folders.

Read are
- plain rows: three strings, kept as they are;
- conversational rows: lists of {role, content}. The response is the last, assistant message of `chosen` and
  `rejected`; what comes before (in `prompt`, in both sides, or in both places) is the prompt;
- rows without `prompt`: conversational ones, or dialogues "\n\nHuman: ...\n\nAssistant: ..." as in HH-RLHF
  (Bai et al. 2022); the turns that both sides share are the prompt.
A dialogue becomes prompt text so: with user turns only, their text, joined by a blank line; with others, every turn
as "Human: ...", "Assistant: ..." or "System: ...", joined by a blank line. Written conversational, it becomes the
turns again.
Optional columns: prompt_id (default: a hash of the prompt), domain, probability, votes_chosen, votes_rejected;
unpaired: prompt_id, domain, votes, of_votes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.config import ConfigError
from contracts.records import COMPARISON_SCHEMA, SCHEMA_VERSION, Comparison
from feedback.exports import datasets_package, write_rows
from feedback.quality import UnpairedLabel

_LABELS = {"user": "Human", "assistant": "Assistant", "system": "System"}
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_RENDERED_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System): ")
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

Turns = list[tuple[str, str]]  # role, text
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


def file_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for errors, row) of each row of a file with these columns.

    Raises:
        ConfigError: the file cannot be read, or a column is missing in all of it.
    """
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _parquet_rows(path, required)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_rows(path)
        elif path.is_dir():
            yield from _folder_rows(path, required)
        else:
            raise ConfigError(f"{path}: read are .parquet, .jsonl, .jsonl.gz and datasets folders")
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        message = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read: {message}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # JSON or UTF-8
                raise ConfigError(f"{path}:{number}: not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}:{number}: a row is an object with named columns, not {row!r:.60}")
            yield f"{path}:{number}", row


def _parquet_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with pq.ParquetFile(path) as file:
        version = (file.schema_arrow.metadata or {}).get(b"headrace_schema_version", b"1")
        if version != str(SCHEMA_VERSION).encode():
            raise ConfigError(f"{path}: has schema version {version.decode()}, this Headrace reads {SCHEMA_VERSION}")
        _check_columns(path, file.schema_arrow.names, required)
        rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
        try:
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: a text is not UTF-8: {error}") from error


def _folder_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    datasets = datasets_package()
    found = datasets.load_from_disk(str(path))
    if not isinstance(found, datasets.Dataset):
        raise ConfigError(f"{path}: has several splits, give the folder of one: {', '.join(found)}")
    _check_columns(path, found.column_names, required)
    for number, row in enumerate(found, start=1):
        yield f"{path}:{number}", row


def _check_columns(path: Path, columns: Sequence[str], required: tuple[str, ...]) -> None:
    for name in required:
        if name not in columns:
            raise ConfigError(f"{path}: column {name!r} is missing, there are: {', '.join(columns)}")


def _schema(plain: pa.Schema, texts: tuple[str, ...], layout: Layout) -> pa.Schema:
    if layout == "plain":
        return plain
    if layout != "conversational":
        raise ValueError(f"layout is {layout!r}, allowed is plain or conversational")
    fields = [pa.field(field.name, _MESSAGES if field.name in texts else field.type) for field in plain]
    return pa.schema(fields, metadata=plain.metadata)


def _laid_out(row: dict[str, Any], responses: tuple[str, ...], layout: Layout) -> dict[str, Any]:
    if layout == "conversational":
        row["prompt"] = [{"role": role, "content": text} for role, text in _prompt_turns(row["prompt"])]
        for name in responses:
            row[name] = [{"role": "assistant", "content": row[name]}]
    return row


def _prompt_turns(text: str) -> Turns:
    """The turns that `_prompt_text` makes this text of; one of the user where it is no dialogue."""
    before, *parts = _RENDERED_TURN.split(text)
    roles = {label: role for role, label in _LABELS.items()}
    turns = [(roles[label], content) for label, content in zip(parts[::2], parts[1::2], strict=True)]
    return turns if not before and _prompt_text(turns) == text else [("user", text)]


def _comparison(row: Mapping[str, Any], where: str) -> tuple[Comparison, str]:
    """The comparison, and why it cannot be used ("" where it can)."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            there = sorted(key for key, value in row.items() if value is not None)
            raise ConfigError(f"{where}: {name!r} is missing, there are: {', '.join(there)}")
    prompt, chosen, rejected, reason = _texts(row, where)
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
    prompt, response, _, reason = _texts({**row, "chosen": row["completion"], "rejected": row["completion"]}, where)
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


def _texts(row: Mapping[str, Any], where: str) -> tuple[str, str, str, str]:
    """prompt, chosen, rejected and "", or "", "", "" and why there are none."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            texts = [_text(row[name], name, where) for name in ("prompt", "chosen", "rejected")]
            return texts[0], texts[1], texts[2], ""
        if prompt is None:
            chosen, rejected = _dialogue(chosen, "chosen", where), _dialogue(rejected, "rejected", where)
        else:  # a conversation as prompt, completions as text
            chosen, rejected = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    shared = [] if prompt is None else _turns(prompt, "prompt", where)
    sides = []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        turns = _turns(value, name, where)
        if not turns or turns[-1][0] != "assistant":
            return "", "", "", "no response"
        # some sets repeat the prompt in front of both sides
        sides.append(turns if turns[: len(shared)] == shared else shared + turns)
    if sides[0][:-1] != sides[1][:-1]:
        return "", "", "", "different prompts"
    return _prompt_text(sides[0][:-1]), sides[0][-1][1], sides[1][-1][1], ""


def _dialogue(text: str, name: str, where: str) -> list[dict[str, str]]:
    before, *parts = _TURN.split(text)
    if not parts or before.strip():
        raise ConfigError(
            f"{where}: no 'prompt', and {name!r} is not a dialogue of Human: and Assistant: turns: {text!r:.60}"
        )
    return [
        {"role": _ROLES[label], "content": content.strip()}
        for label, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _turns(value: Any, name: str, where: str) -> Turns:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ConfigError(f"{where}: {name!r} is neither text nor a list of messages like the others: {value!r:.60}")
    turns = []
    for message in value:
        role = message.get("role")
        if role not in _LABELS:
            raise ConfigError(f"{where}: a message of {name!r} has role {role!r}, allowed are {', '.join(_LABELS)}")
        turns.append((role, _text(message.get("content"), f"content of {name}", where)))
    return turns


def _prompt_text(turns: Turns) -> str:
    if all(role == "user" for role, _ in turns):
        return "\n\n".join(text for _, text in turns)
    return "\n\n".join(f"{_LABELS[role]}: {text}" for role, text in turns)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name!r} is {value!r:.60}, allowed is text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {name!r} holds half a surrogate pair, which is no text") from error
    return value


def _optional_text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # ids are often numbers
    return "" if value is None else _text(value, name, where)


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
