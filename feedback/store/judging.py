"""Taking judgments: checked, added, counted in one transaction; the same key brings the same receipt."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, bindparam, insert, or_, select, update

from feedback.store.asking import add_task, assignment, count_votes, digest, end_lease, lease, live_lease, standing
from feedback.store.people import active_annotator, named_annotators
from feedback.store.records import (
    Assignment,
    Judgment,
    Receipt,
    Refused,
    TaskKind,
    check_judgment,
    check_text,
    is_number,
)
from feedback.store.schema import add_row, judgments, leases, responses, tasks

_CLOCK_SLACK_S = 1.0
_OTHER_SIDE = {"a": "b", "b": "a"}


def submit(
    connection: Connection, annotator_id: int, task_id: str, judgment: Judgment, lease_id: str, *, now: float
) -> Receipt:
    """A vote on a leased task.

    Raises:
        Refused: key_reused, unknown_annotator, unknown_task, no_lease, lease_expired, lease_ended, already_voted,
            bad_choice, bad_value, bad_time, bad_text.
    """
    active_annotator(connection, annotator_id)
    act = f"vote {task_id}"
    before = _repeated(connection, annotator_id, judgment, act)
    if before:
        return before
    if connection.scalar(select(tasks.c.id).where(tasks.c.id == task_id).with_for_update()) is None:
        raise Refused("unknown_task", f"there is no task {task_id!r:.80}")
    before = _repeated(connection, annotator_id, judgment, act)
    if before:  # PostgreSQL: the same request, which had the lock until now
        return before
    held = live_lease(connection, lease_id, annotator_id, now=now)
    if held.task_id != task_id:
        raise Refused("no_lease", f"lease {lease_id} is on another task than {task_id!r:.80}")
    check_judgment(judgment, held.kind, held.scale)
    if judgment.active_s is not None and judgment.active_s > now - held.issued_s + _CLOCK_SLACK_S:
        age_s = now - held.issued_s
        raise Refused("bad_time", f"active_s is {judgment.active_s}, but the task was shown {age_s:.1f} s ago")
    end_lease(connection, lease_id)
    how = {"origin": "asked", "lease_id": lease_id, "shown_left": held.shown_left}
    return _vote(connection, annotator_id, task_id, judgment, act, how, now=now)


def judge_served(
    connection: Connection,
    annotator_id: int,
    kind: TaskKind,
    response_id: str,
    judgment: Judgment,
    *,
    other_response_id: str | None,
    shown_left: str | None,
    scale: int,
    now: float,
) -> Receipt:
    """A judgment of an answer (a) that was served, or of it and another one (b): nobody was asked, so no lease.

    Raises:
        Refused: unknown_response, already_voted and what else `submit` raises.
    """
    active_annotator(connection, annotator_id)
    if shown_left not in ("a", "b", None) or (shown_left and kind != "pair"):
        raise Refused("bad_choice", f"shown_left is {shown_left!r:.40}, allowed is a or b, with a pair")
    act = f"served {kind} {response_id} {other_response_id} {shown_left}"
    sides = [response_id] if other_response_id is None else sorted((response_id, other_response_id))
    swapped = sides[0] != response_id  # one task for both orders
    before = _repeated(connection, annotator_id, judgment, act)
    if before:
        return _sides_swapped(before) if swapped else before
    check_judgment(judgment, kind, scale)
    stored = judgment
    if swapped:
        aspects = {name: _OTHER_SIDE.get(str(said), said) for name, said in judgment.aspects.items()}
        choice = _OTHER_SIDE.get(judgment.choice or "", judgment.choice)
        stored = replace(judgment, choice=choice, aspects=aspects)
        shown_left = _OTHER_SIDE.get(shown_left or "", shown_left)
    named = digest("served", kind, *sides)
    task_id = add_task(
        connection, kind, sides[0], sides[1] if len(sides) > 1 else None,
        required_votes=0, scale=scale, task_id=named, now=now,
    )  # fmt: skip
    kept_scale = connection.scalar(select(tasks.c.scale).where(tasks.c.id == task_id).with_for_update())
    before = _repeated(connection, annotator_id, judgment, act)
    if before:  # as in submit
        return _sides_swapped(before) if swapped else before
    check_judgment(stored, kind, int(kept_scale or scale))
    how = {"origin": "served", "lease_id": None, "shown_left": shown_left}
    receipt = _vote(connection, annotator_id, task_id, stored, act, how, now=now, digest_of=judgment)
    return _sides_swapped(receipt) if swapped else receipt


def _sides_swapped(receipt: Receipt) -> Receipt:
    return replace(receipt, weights_version_a=receipt.weights_version_b, weights_version_b=receipt.weights_version_a)


def undo(
    connection: Connection,
    annotator_id: int,
    judgment_id: int,
    idempotency_key: str,
    *,
    now: float,
    lease_s: float,
    rng: random.Random,
) -> Assignment | None:
    """Take an own vote back: a new row supersedes it. The task is leased again, where the vote was asked for.

    Raises:
        Refused: unknown_judgment, already_undone, key_reused, unknown_annotator.
    """
    active_annotator(connection, annotator_id, lock=True)
    check_text("idempotency_key", idempotency_key, max_chars=200, blank=False)
    said = connection.execute(
        select(judgments).where(judgments.c.id == judgment_id, judgments.c.annotator_id == annotator_id)
    ).one_or_none()
    if said is None or said.act != "vote":
        raise Refused("unknown_judgment", f"annotator {annotator_id} has no vote {judgment_id}")
    act = f"undo {judgment_id}"
    taken_back = Judgment(idempotency_key)
    if _repeated(connection, annotator_id, taken_back, act):
        held = connection.scalar(
            select(leases.c.id)
            .where(leases.c.task_id == said.task_id, leases.c.annotator_id == annotator_id)
            .where(~leases.c.ended, leases.c.deadline_s > now)
        )
        return assignment(connection, held) if held else None
    connection.execute(select(tasks.c.id).where(tasks.c.id == said.task_id).with_for_update())
    if _latest(connection, said.task_id, annotator_id) != (said.id, said.revision, "vote"):
        raise Refused("already_undone", f"vote {judgment_id} no longer stands")
    how = {"origin": said.origin, "lease_id": None, "shown_left": None}
    before = (said.id, said.revision)
    row = _row(annotator_id, said.task_id, taken_back, act, how, before, taken_back, now=now)
    add_row(connection, judgments, row)
    if said.choice != "skip":
        count_votes(connection, said.task_id, -1)
    if said.origin != "asked":
        return None
    return lease(connection, said.task_id, annotator_id, now=now, lease_s=lease_s, rng=rng)


@dataclass(frozen=True)
class ImportedVote:
    """A vote from elsewhere: of a simulated voter or a file."""

    task_id: str
    voter: str
    judgment: Judgment
    shown_left: str | None = None
    created_s: float | None = None


def add_votes(connection: Connection, votes: Iterable[ImportedVote], *, now: float) -> tuple[int, Counter[str]]:
    """Add votes that were not asked for here. Returns how many, and how many were dropped by reason (codes)."""
    batch = list(votes)
    known: dict[str, Any] = {
        row.id: row
        for row in connection.execute(
            select(tasks.c.id, tasks.c.kind, tasks.c.scale).where(tasks.c.id.in_({vote.task_id for vote in batch}))
        )
    }
    usable, dropped = [], Counter[str]()
    for vote in batch:
        try:
            _check_imported(vote, known, now=now)
            usable.append(vote)
        except Refused as refused:
            dropped[refused.code] += 1
    people = named_annotators(connection, {vote.voter for vote in usable}, now=now)
    latest = _latest_of(connection, {vote.task_id for vote in usable})
    rows, more = [], Counter[str]()
    for vote in usable:
        person = people[vote.voter]
        before = latest.get((vote.task_id, person))
        if before and before[2] == "vote":
            dropped["already_voted"] += 1
            continue
        how = {"origin": "imported", "lease_id": None, "shown_left": vote.shown_left}
        act = f"vote {vote.task_id}"
        row = _row(person, vote.task_id, vote.judgment, act, how, before, vote.judgment, now=vote.created_s or now)
        row["idempotency_key"] = f"imported {vote.task_id} {row['revision']}"
        rows.append(row)
        latest[vote.task_id, person] = (0, row["revision"], "vote")
        more[vote.task_id] += vote.judgment.choice != "skip"
    if rows:
        connection.execute(insert(judgments), rows)
        votes_now = tasks.c.votes + bindparam("more")
        is_open = tasks.c.gold.is_(None) & (votes_now < tasks.c.required_votes)
        change = update(tasks).where(tasks.c.id == bindparam("task")).values(votes=votes_now, open=is_open)
        connection.execute(change, [{"task": task_id, "more": count} for task_id, count in more.items()])
    return len(rows), dropped


def _check_imported(vote: ImportedVote, known: Mapping[str, Any], *, now: float) -> None:
    task = known.get(vote.task_id)
    if task is None:
        raise Refused("unknown_task", f"there is no task {vote.task_id!r:.80}")
    check_text("voter", vote.voter, max_chars=200, blank=False)
    check_judgment(vote.judgment, task.kind, task.scale)
    if vote.shown_left not in ("a", "b", None):
        raise Refused("bad_choice", f"left is {vote.shown_left!r:.40}, allowed is a or b")
    if vote.created_s is not None and not (is_number(vote.created_s) and 0 < vote.created_s <= now):
        raise Refused("bad_time", f"created_s is {vote.created_s!r:.40}, allowed is a time that has been")


def _vote(
    connection: Connection,
    annotator_id: int,
    task_id: str,
    judgment: Judgment,
    act: str,
    how: dict[str, Any],
    *,
    now: float,
    digest_of: Judgment | None = None,
) -> Receipt:
    before = _latest(connection, task_id, annotator_id)
    if before and before[2] == "vote":
        raise Refused("already_voted", f"annotator {annotator_id} has voted on task {task_id}: undo that first")
    row = _row(annotator_id, task_id, judgment, act, how, before, digest_of or judgment, now=now)
    added = add_row(connection, judgments, row)
    if judgment.choice != "skip":
        count_votes(connection, task_id, 1)
    return _receipt(connection, added, task_id, repeated=False)


def _row(
    annotator_id: int,
    task_id: str,
    judgment: Judgment,
    act: str,
    how: dict[str, Any],
    before: tuple[Any, ...] | None,
    digest_of: Judgment,
    *,
    now: float,
) -> dict[str, Any]:
    return how | {
        "task_id": task_id,
        "annotator_id": annotator_id,
        "revision": before[1] + 1 if before else 0,
        "supersedes": before[0] if before else None,
        "act": act.split()[0] if act.startswith("undo") else "vote",
        "choice": judgment.choice,
        "value": judgment.value,
        "text": judgment.text,
        "strength": judgment.strength,
        "aspects": judgment.aspects,
        "rationale": judgment.rationale,
        "active_s": judgment.active_s,
        "client_version": judgment.client_version,
        "guideline_version": judgment.guideline_version,
        "idempotency_key": judgment.idempotency_key,
        "digest": digest_of.digest(act),
        "created_s": now,
    }


def _repeated(connection: Connection, annotator_id: int, judgment: Judgment, act: str) -> Receipt | None:
    key = check_text("idempotency_key", judgment.idempotency_key, max_chars=200, blank=False)
    row = connection.execute(
        select(judgments.c.id, judgments.c.task_id, judgments.c.digest).where(
            judgments.c.annotator_id == annotator_id, judgments.c.idempotency_key == key
        )
    ).one_or_none()
    if row is None:
        return None
    if row.digest != judgment.digest(act):
        raise Refused("key_reused", f"the idempotency key {key!r:.40} already stands for something else")
    return _receipt(connection, row.id, row.task_id, repeated=True)


def _latest(connection: Connection, task_id: str, annotator_id: int) -> tuple[int, int, str] | None:
    """(id, revision, act) of the last thing that this person did about the task."""
    row = connection.execute(
        select(judgments.c.id, judgments.c.revision, judgments.c.act)
        .where(judgments.c.task_id == task_id, judgments.c.annotator_id == annotator_id)
        .order_by(judgments.c.revision.desc())
        .limit(1)
    ).one_or_none()
    return (row.id, row.revision, row.act) if row else None


def _latest_of(connection: Connection, task_ids: set[str]) -> dict[tuple[str, int], tuple[int, int, str]]:
    found = connection.execute(
        select(judgments.c.task_id, judgments.c.annotator_id, judgments.c.id, judgments.c.revision, judgments.c.act)
        .where(judgments.c.task_id.in_(task_ids))
        .where(or_(judgments.c.act == "undo", standing()))
        .order_by(judgments.c.revision)
    )
    return {(row.task_id, row.annotator_id): (row.id, row.revision, row.act) for row in found}


def _receipt(connection: Connection, judgment_id: int, task_id: str, *, repeated: bool) -> Receipt:
    a, b = responses.alias(), responses.alias()
    versions = connection.execute(
        select(a.c.weights_version, b.c.weights_version)
        .select_from(tasks)
        .join(a, tasks.c.response_a == a.c.id)
        .outerjoin(b, tasks.c.response_b == b.c.id)
        .where(tasks.c.id == task_id)
    ).one()
    return Receipt(int(judgment_id), task_id, repeated, *versions)
