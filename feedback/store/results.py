"""From judgments to probabilities, and from these to datasets of a name, a version and a content hash."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sqlalchemy import Connection, Select, func, insert, select

from contracts.records import Comparison
from feedback.ballots import Ballots
from feedback.quality import Aggregate, UnpairedLabel, comparisons, dawid_skene, majority
from feedback.simulate import Choice, Pair
from feedback.store.asking import standing
from feedback.store.records import AggregateRun, Refused
from feedback.store.schema import (
    ROWS_AT_ONCE,
    add_row,
    aggregate_runs,
    aggregates,
    annotators,
    datasets,
    gaps,
    judgments,
    prompts,
    responses,
    tasks,
)

Method = Literal["dawid_skene", "majority"]
Judged = Literal["pair", "label", "thumbs"]
METHOD_VERSION = "1"  # of what feedback/quality.py computes
_A, _B = responses.alias("a"), responses.alias("b")
_PAIR_OF = (
    select(
        tasks.c.id, prompts.c.name, prompts.c.text, prompts.c.domain, _A.c.text.label("a"), _B.c.text.label("b"),
        tasks.c.prompt_id, aggregates.c.probability, aggregates.c.votes_a, aggregates.c.votes_b,
        aggregates.c.both_bad, aggregates.c.votes,
    )
    .select_from(aggregates)
    .join(tasks, aggregates.c.task_id == tasks.c.id)
    .join(prompts, tasks.c.prompt_id == prompts.c.id)
    .join(_A, tasks.c.response_a == _A.c.id)
    .outerjoin(_B, tasks.c.response_b == _B.c.id)
    .order_by(tasks.c.id)
)  # fmt: skip


@dataclass(frozen=True)
class DatasetQuery:
    """Which rows of one aggregation. Gold checks stay out: their answers were given, not found.

    aggregate_id: of `Store.aggregate` or an import.
    domain: of the prompts, None for all.
    source: of response a, None for all.
    min_votes: judgments a task needs.
    min_certainty: the least probability of the likelier side.
    """

    aggregate_id: int
    domain: str | None = None
    source: str | None = None
    min_votes: int = 0
    min_certainty: float = 0.5


@dataclass(frozen=True)
class DatasetVersion:
    """What was exported: the hash is of the rows, whatever the format of the file. `dropped` counts by reason."""

    name: str
    version: int
    content_hash: str
    rows: int
    dropped: dict[str, int]
    query: DatasetQuery
    gaps: int


def ballots(connection: Connection, kind: Judged, *, up_to: int | None = None) -> Ballots:
    """All standing votes of that kind as arrays, oldest first. Of labels, good is `a` and bad is `b`."""
    said = (judgments.c.choice, judgments.c.value, judgments.c.shown_left, judgments.c.active_s)
    query = (
        select(judgments.c.task_id, annotators.c.name, *said)
        .select_from(judgments)
        .join(tasks, judgments.c.task_id == tasks.c.id)
        .join(annotators, judgments.c.annotator_id == annotators.c.id)
        .where(tasks.c.kind == kind, standing())
        .order_by(judgments.c.id)
    )
    if up_to is not None:
        query = query.where(judgments.c.id <= up_to)
    columns: list[list[Any]] = [[] for _ in range(6)]
    for part in connection.execution_options(yield_per=ROWS_AT_ONCE).execute(query).partitions():
        for column, values in zip(columns, zip(*part, strict=True), strict=True):
            column.extend(values)
    task_ids, names, choices, numbers, left, active_s = columns
    if kind != "pair":
        choices = [choice or ("a" if value else "b") for choice, value in zip(choices, numbers, strict=True)]
    return Ballots.from_columns(task_ids, names, choices, left=left, active_s=active_s)


def gold_answers(connection: Connection, kind: Judged) -> dict[str, Choice]:
    found = connection.execute(select(tasks.c.id, tasks.c.gold).where(tasks.c.kind == kind, tasks.c.gold.is_not(None)))
    labels: dict[str, Choice] = {"1": "a", "0": "b"}
    return {task_id: labels.get(answer, answer) for task_id, answer in found}


def gold_checks(connection: Connection) -> dict[str, tuple[int, int]]:
    """By annotator: how many gold checks were answered right, of how many. Skips are in neither."""
    found = connection.execute(
        select(annotators.c.name, tasks.c.gold, judgments.c.choice, judgments.c.value)
        .select_from(judgments)
        .join(tasks, judgments.c.task_id == tasks.c.id)
        .join(annotators, judgments.c.annotator_id == annotators.c.id)
        .where(tasks.c.gold.is_not(None), standing(), func.coalesce(judgments.c.choice, "") != "skip")
    )
    right, of = Counter[str](), Counter[str]()
    for name, gold, choice, value in found:
        of[name] += 1
        right[name] += gold == (choice or f"{value:g}")
    return {name: (right[name], of[name]) for name in sorted(of)}


@dataclass(frozen=True)
class Snapshot:
    """The votes of one moment, ready to be aggregated without holding the database."""

    kind: Judged
    ballots: Ballots
    gold: dict[str, Choice]
    last_judgment_id: int
    gaps: int


def snapshot(connection: Connection, kind: Judged) -> Snapshot:
    last = connection.scalar(select(func.coalesce(func.max(judgments.c.id), 0))) or 0
    found = ballots(connection, kind, up_to=last)
    return Snapshot(kind, found, gold_answers(connection, kind), int(last), _gaps(connection))


def aggregated(votes: Snapshot, method: Method) -> Aggregate:
    if method == "majority":
        return majority(votes.ballots)
    if method == "dawid_skene":
        return dawid_skene(votes.ballots, gold=votes.gold)
    raise ValueError(f"method is {method!r}, allowed is dawid_skene or majority")


def keep_aggregate(
    connection: Connection, votes: Snapshot, method: Method, found: Aggregate, *, now: float
) -> AggregateRun:
    counts = votes.ballots.sum_P(votes.ballots.signs_N * 0 + 1).astype(int).tolist()
    of_votes = dict(zip(votes.ballots.pair_ids, counts, strict=True))
    rows = (
        {
            "task_id": task_id,
            "probability": probability,
            "votes_a": found.votes[task_id][0],
            "votes_b": found.votes[task_id][1],
            "both_bad": found.both_bad.get(task_id, 0),
            "votes": of_votes[task_id],
        }
        for task_id, probability in found.probability_a.items()
    )
    judged = sum(counts)
    return add_run(
        connection, votes.kind, method, METHOD_VERSION, rows,
        judged=judged, last=votes.last_judgment_id, gaps=votes.gaps, now=now,
    )  # fmt: skip


def add_run(
    connection: Connection,
    kind: str,
    method: str,
    version: str,
    rows: Iterable[dict[str, Any]],
    *,
    judged: int,
    last: int,
    gaps: int,
    now: float,
) -> AggregateRun:
    """Aggregates of tasks, and what they are from."""
    rows = list(rows)
    run = AggregateRun(0, kind, method, version, len(rows), judged, last, gaps)
    head = asdict(run) | {"created_s": now}
    del head["aggregate_id"]
    run_id = add_row(connection, aggregate_runs, head)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        connection.execute(insert(aggregates), [row | {"run_id": run_id} for row in rows[start : start + ROWS_AT_ONCE]])
    return replace(run, aggregate_id=run_id)


def aggregate_run(connection: Connection, aggregate_id: int) -> AggregateRun:
    columns = [aggregate_runs.c[name] for name in AggregateRun.__dataclass_fields__ if name != "aggregate_id"]
    query = select(aggregate_runs.c.id, *columns).where(aggregate_runs.c.id == aggregate_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise Refused("unknown_aggregate", f"there is no aggregate {aggregate_id}")
    return AggregateRun(*row)


def probabilities(connection: Connection, aggregate_id: int) -> dict[str, float]:
    aggregate_run(connection, aggregate_id)
    found = select(aggregates.c.task_id, aggregates.c.probability).where(aggregates.c.run_id == aggregate_id)
    return {row.task_id: row.probability for row in connection.execute(found.order_by(aggregates.c.task_id))}


def preferences(connection: Connection, query: DatasetQuery, dropped: Counter[str]) -> Iterator[Comparison]:
    """The likelier side of each pair as `chosen`, streamed in the order of task ids; ties stay soft targets."""
    if aggregate_run(connection, query.aggregate_id).kind != "pair":
        raise Refused("bad_task", f"aggregate {query.aggregate_id} is not one of pairs: export unpaired labels")
    for part in _parts(connection, query, dropped):
        pairs = [Pair(row.id, row.name or row.prompt_id, row.text, row.a, row.b, row.domain) for row in part]
        found = {row.id: row.probability for row in part}
        votes = {row.id: (row.votes_a, row.votes_b) for row in part}
        kept, left_out = comparisons(pairs, Aggregate(found, votes=votes))
        dropped.update(left_out)
        yield from kept


def unpaired(connection: Connection, query: DatasetQuery, dropped: Counter[str]) -> Iterator[UnpairedLabel]:
    """Of labels and thumbs: good above one half. Of pairs: both bad where more than half of the votes say so."""
    pairs = aggregate_run(connection, query.aggregate_id).kind == "pair"
    for part in _parts(connection, query, dropped):
        for row in part:
            name = row.name or row.prompt_id
            if not pairs and row.probability == 0.5:
                dropped["undecided"] += 1
            elif not pairs:
                good = row.probability > 0.5
                votes = row.votes_a if good else row.votes_b
                yield UnpairedLabel(row.text, row.a, good, name, votes, row.votes)
            elif 2 * row.both_bad > row.votes:
                for response in (row.a, row.b):
                    yield UnpairedLabel(row.text, response, False, name, row.both_bad, row.votes)
            else:
                dropped["not both bad"] += 1


def _parts(connection: Connection, query: DatasetQuery, dropped: Counter[str]) -> Iterator[list[Any]]:
    wanted: Select[Any] = _PAIR_OF.where(aggregates.c.run_id == query.aggregate_id, tasks.c.gold.is_(None))
    if query.domain is not None:
        wanted = wanted.where(prompts.c.domain == query.domain)
    if query.source is not None:
        wanted = wanted.where(_A.c.source == query.source)
    for part in connection.execution_options(yield_per=ROWS_AT_ONCE).execute(wanted).partitions():
        kept = []
        for row in part:
            if row.votes < query.min_votes:
                dropped["few votes"] += 1
            elif max(row.probability, 1 - row.probability) < query.min_certainty:
                dropped["uncertain"] += 1
            else:
                kept.append(row)
        yield kept


class ContentHash:
    """Of rows in their order, as canonical JSON: `through` passes them on."""

    def __init__(self) -> None:
        self.rows = 0
        self._hash = hashlib.sha256()

    def through(self, rows: Iterable[Any]) -> Iterator[Any]:
        for row in rows:
            self._hash.update(json.dumps(asdict(row), sort_keys=True, ensure_ascii=False).encode() + b"\n")
            self.rows += 1
            yield row

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def keep_dataset(
    connection: Connection, name: str, query: DatasetQuery, content: ContentHash, dropped: Counter[str], *, now: float
) -> DatasetVersion:
    """The next version of that name; the version it has already where content and query are the same."""
    newest = connection.execute(
        select(datasets).where(datasets.c.name == name).order_by(datasets.c.version.desc()).limit(1)
    ).one_or_none()
    if newest and newest.content_hash == content.hexdigest() and newest.query == asdict(query):
        return _dataset(newest)
    row = {"name": name, "version": newest.version + 1 if newest else 1, "query": asdict(query)}
    row |= {"content_hash": content.hexdigest(), "rows": content.rows, "dropped": dict(dropped)}
    connection.execute(insert(datasets).values(**row, gaps=_gaps(connection), created_s=now))
    return dataset_versions(connection, name)[-1]


def dataset_versions(connection: Connection, name: str) -> list[DatasetVersion]:
    found = connection.execute(select(datasets).where(datasets.c.name == name).order_by(datasets.c.version))
    return [_dataset(row) for row in found]


def _dataset(row: Any) -> DatasetVersion:
    return DatasetVersion(
        row.name, row.version, row.content_hash, row.rows, row.dropped, DatasetQuery(**row.query), row.gaps
    )


def _gaps(connection: Connection) -> int:
    return int(connection.scalar(select(func.count()).select_from(gaps)) or 0)
