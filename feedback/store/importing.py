"""Files into the store, a chunk at a time in one transaction: all of a file or nothing of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, func, insert, select, update

from contracts.config import ConfigError
from contracts.records import Comparison
from feedback.formats import stream_preferences, stream_unpaired
from feedback.quality import UnpairedLabel
from feedback.rows import file_rows
from feedback.simulate import Pair
from feedback.store.asking import prompt_row, response_row, task_row
from feedback.store.judging import ImportedVote, add_votes
from feedback.store.records import Candidate, ImportReport, Judgment, Refused, Source
from feedback.store.results import add_run
from feedback.store.schema import (
    ROWS_AT_ONCE,
    aggregate_runs,
    aggregates,
    gaps,
    insert_new,
    judgments,
    prompts,
    responses,
    tasks,
)

T = TypeVar("T")
Truncate = Callable[[str], str]


def import_preferences(
    connection: Connection, path: Path, *, truncate: Truncate | None, required_votes: int, now: float
) -> ImportReport:
    """Pairs of a preference file, as tasks to be asked `required_votes` times, and what the file says of them as an
    aggregate of the method "imported". Which response becomes a follows from hashes of the texts: it tells nothing."""
    dropped: Counter[str] = Counter()

    def rows_of(row: Comparison) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        prompt = prompt_row(row.prompt, row.prompt_id, row.domain, None, now)
        sides = [response_row(prompt["id"], text, source="file", now=now) for text in (row.chosen, row.rejected)]
        votes = [row.votes_chosen, row.votes_rejected]
        probability = row.probability
        if sides[0]["id"] > sides[1]["id"]:
            sides, votes, probability = sides[::-1], votes[::-1], 1 - probability
        task = task_row("pair", prompt["id"], sides[0]["id"], sides[1]["id"], required_votes=required_votes, now=now)
        said = {"task_id": task["id"], "probability": probability, "votes_a": votes[0], "votes_b": votes[1]}
        return prompt, sides, task, said | {"both_bad": 0, "votes": sum(votes)}

    rows = stream_preferences(path, dropped, truncate=truncate)
    return _import(connection, "pair", rows, rows_of, dropped, now=now)


def import_unpaired(
    connection: Connection, path: Path, *, truncate: Truncate | None, required_votes: int, now: float
) -> ImportReport:
    """The same for labels of single responses."""
    dropped: Counter[str] = Counter()

    def rows_of(row: UnpairedLabel) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        prompt = prompt_row(row.prompt, row.prompt_id, "", None, now)
        response = response_row(prompt["id"], row.response, source="file", now=now)
        task = task_row("label", prompt["id"], response["id"], None, required_votes=required_votes, now=now)
        votes = [row.votes, row.of_votes - row.votes]
        said = {"task_id": task["id"], "probability": float(row.good), "both_bad": 0, "votes": row.of_votes}
        said |= dict(zip(("votes_a", "votes_b"), votes if row.good else votes[::-1], strict=True))
        return prompt, [response], task, said

    rows = stream_unpaired(path, dropped, truncate=truncate)
    return _import(connection, "label", rows, rows_of, dropped, now=now)


def _import(
    connection: Connection,
    kind: str,
    rows: Iterable[T],
    rows_of: Callable[[T], tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], dict[str, Any]]],
    dropped: Counter[str],
    *,
    now: float,
) -> ImportReport:
    last = connection.scalar(select(func.coalesce(func.max(judgments.c.id), 0))) or 0
    gone = connection.scalar(select(func.count()).select_from(gaps)) or 0
    head = add_run(connection, kind, "imported", "1", [], judged=0, last=int(last), gaps=int(gone), now=now)
    kept = known = 0
    for part in chunks(rows, ROWS_AT_ONCE):
        said: dict[str, dict[str, Any]] = {}
        texts: dict[str, dict[str, Any]] = {}
        sides: dict[str, dict[str, Any]] = {}
        asked: dict[str, dict[str, Any]] = {}
        usable = 0
        for row in part:
            try:
                prompt, answers, task, verdict = rows_of(row)
            except Refused as refused:
                dropped[refused.code] += 1
                continue
            usable += 1
            texts[prompt["id"]] = prompt
            sides |= {answer["id"]: answer for answer in answers}
            asked[task["id"]] = task
            said.setdefault(task["id"], verdict | {"run_id": head.aggregate_id})
        in_file = select(aggregates.c.task_id).where(aggregates.c.run_id == head.aggregate_id)
        for task_id in connection.scalars(in_file.where(aggregates.c.task_id.in_(said))):
            del said[task_id]  # an earlier chunk had it
        there = set(connection.scalars(select(tasks.c.id).where(tasks.c.id.in_(asked))))
        kept += len(asked.keys() - there)
        known += usable - len(asked.keys() - there)
        insert_new(connection, prompts, texts.values())
        insert_new(connection, responses, sides.values())
        insert_new(connection, tasks, asked.values())
        if said:
            connection.execute(insert(aggregates), list(said.values()))
    _count_tasks(connection, head.aggregate_id)
    return ImportReport(kept, known, dict(dropped), head.aggregate_id)


def _count_tasks(connection: Connection, run_id: int) -> None:
    counted, voted = connection.execute(
        select(func.count(), func.coalesce(func.sum(aggregates.c.votes), 0)).where(aggregates.c.run_id == run_id)
    ).one()
    change = update(aggregate_runs).where(aggregate_runs.c.id == run_id)
    connection.execute(change.values(tasks=counted, judgments=voted))


def add_pairs(
    connection: Connection,
    pairs: Iterable[Pair],
    *,
    source: Source,
    required_votes: int,
    weights_version: int | None,
    now: float,
) -> ImportReport:
    """Pairs as tasks that keep their ids. Dropped and counted: `identical` responses, and `bad_text`, which no database
    takes: a policy may write a NUL."""
    kept = known = 0
    dropped: Counter[str] = Counter()
    for part in chunks(pairs, ROWS_AT_ONCE):
        texts: list[dict[str, Any]] = []
        sides: list[dict[str, Any]] = []
        asked: dict[str, dict[str, Any]] = {}
        for pair in part:
            if pair.response_a.strip() == pair.response_b.strip():
                dropped["identical"] += 1
                continue
            try:
                prompt = prompt_row(pair.prompt, pair.prompt_id, pair.domain, None, now)
                a, b = (
                    response_row(prompt["id"], text, source=source, weights_version=weights_version, now=now)
                    for text in (pair.response_a, pair.response_b)
                )
            except Refused as refused:
                dropped[refused.code] += 1
                continue
            texts.append(prompt)
            sides.extend((a, b))
            options: Any = {"required_votes": required_votes, "task_id": pair.pair_id, "now": now}
            asked[pair.pair_id] = task_row("pair", prompt["id"], a["id"], b["id"], **options)
        there = set(connection.scalars(select(tasks.c.id).where(tasks.c.id.in_(asked))))
        kept += len(asked.keys() - there)
        known += len(there)
        for table, rows in ((prompts, texts), (responses, sides), (tasks, asked.values())):
            insert_new(connection, table, rows)
    return ImportReport(kept, known, dict(dropped))


def add_candidates(
    connection: Connection, candidates: Iterable[Candidate], *, required_votes: int, gold: bool, now: float
) -> ImportReport:
    """Pairs as tasks; with `gold` as checks of annotators, of which `first` is the better response. A task that is
    there stays as it is. Dropped are identical responses ("identical") and texts that are none (codes)."""
    kept = known = 0
    dropped: Counter[str] = Counter()
    for part in chunks(candidates, ROWS_AT_ONCE):
        texts: dict[str, dict[str, Any]] = {}
        sides: dict[str, dict[str, Any]] = {}
        asked: dict[str, dict[str, Any]] = {}
        usable = 0
        for candidate in part:
            if candidate.first.text.strip() == candidate.second.text.strip():
                dropped["identical"] += 1
                continue
            try:
                prompt, both, task = _rows_of(candidate, required_votes=required_votes, gold=gold, now=now)
            except Refused as refused:
                dropped[refused.code] += 1
                continue
            usable += 1
            texts[prompt["id"]] = prompt
            sides |= {side["id"]: side for side in both}
            asked[task["id"]] = task
        there = set(connection.scalars(select(tasks.c.id).where(tasks.c.id.in_(asked))))
        kept += len(asked.keys() - there)
        known += usable - len(asked.keys() - there)
        for table, rows in ((prompts, texts), (responses, sides), (tasks, asked)):
            insert_new(connection, table, rows.values())
    return ImportReport(kept, known, dict(dropped))


def _rows_of(
    candidate: Candidate, *, required_votes: int, gold: bool, now: float
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    prompt = prompt_row(candidate.prompt, candidate.prompt_name, candidate.domain, candidate.messages, now)
    first, second = (
        response_row(
            prompt["id"], side.text, source=candidate.source, now=now,
            weights_version=side.weights_version, sampling=side.sampling,
        )
        for side in (candidate.first, candidate.second)
    )  # fmt: skip
    a, b = sorted((first, second), key=lambda row: str(row["id"]))
    answer = ("a" if a is first else "b") if gold else None
    task = task_row(
        "pair", prompt["id"], a["id"], b["id"],
        required_votes=required_votes, score=candidate.score, gold=answer, now=now,
    )  # fmt: skip
    return prompt, [a, b], task


def import_votes(connection: Connection, path: Path, *, voters: str, now: float) -> ImportReport:
    """Votes on tasks that are there: `task_id`, `voter` and `choice` or `value`, optional `left`, `active_s`,
    `created_s`, `strength`, `rationale`. A voter is called `voters`:name here, so that nobody votes for another.

    Dropped are, by code, unknown_task, bad_choice, bad_value, bad_time, bad_text, already_voted.
    """
    kept, dropped = 0, Counter[str]()
    for part in chunks(_votes(path, voters), ROWS_AT_ONCE):
        added, left_out = add_votes(connection, part, now=now)
        kept += added
        dropped.update(left_out)
    return ImportReport(kept, 0, dict(dropped))


def _votes(path: Path, voters: str) -> Iterator[ImportedVote]:
    for where, row in file_rows(path, ("task_id", "voter")):
        for name in ("task_id", "voter"):
            if not isinstance(row.get(name), str):
                raise ConfigError(f"{where}: {name!r} is {row.get(name)!r:.60}, allowed is text")
        judgment = Judgment(
            "imported",
            choice=row.get("choice"),
            value=row.get("value"),
            strength=row.get("strength"),
            rationale=row.get("rationale") or "",
            active_s=row.get("active_s"),
        )
        voter = f"{voters}:{row['voter']}" if row["voter"].strip() else ""
        yield ImportedVote(row["task_id"], voter, judgment, row.get("left"), row.get("created_s"))


def chunks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` rows, the last one shorter."""
    rows = iter(rows)
    while part := list(islice(rows, size)):
        yield part
