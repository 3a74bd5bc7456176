"""Tasks, and who is asked which one: every open lease holds a place among a task's required votes."""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, exists, func, insert, select, update

from feedback.store.people import active_annotator
from feedback.store.records import (
    Assignment,
    Progress,
    Refused,
    Source,
    TaskKind,
    Totals,
    check_gold,
    check_kind,
    check_text,
    is_number,
)
from feedback.store.schema import insert_new, judgments, leases, prompts, responses, tasks

_LATER = judgments.alias("later")
_RESPONSE_A, _RESPONSE_B = responses.alias("a"), responses.alias("b")
MAX_LEASE_S = 86_400.0


def standing() -> ColumnElement[bool]:
    """Of judgments: a vote that nothing supersedes."""
    return and_(judgments.c.act == "vote", ~exists().where(_LATER.c.supersedes == judgments.c.id))


def prompt_row(text: str, name: str, domain: str, messages: list[dict[str, str]] | None, now: float) -> dict[str, Any]:
    """Its id is a hash of its name and text, so that the same one comes in once."""
    for field, value in (("prompt", text), ("name", name), ("domain", domain)):
        check_text(field, value, blank=field != "prompt")
    found = {"id": digest("prompt", name, text), "name": name, "text": text, "messages": messages}
    return found | {"domain": domain, "created_s": now}


def response_row(
    prompt_id: str,
    text: str,
    *,
    source: Source,
    now: float,
    weights_version: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    response_id: str | None = None,
) -> dict[str, Any]:
    """Its id is a hash of all that it is, unless it has one already (an answer that was served)."""
    if source not in ("live", "versions", "file"):
        raise Refused("bad_task", f"source is {source!r:.60}, allowed is live, versions or file")
    check_text("response", text)
    if weights_version is not None and (type(weights_version) is not int or not 0 <= weights_version < 2**53):
        raise Refused("bad_task", f"weights_version is {weights_version!r:.60}, allowed is 0 or more")
    version = "" if weights_version is None else str(weights_version)
    return {
        "id": response_id or digest("response", prompt_id, text, source, version),
        "prompt_id": prompt_id,
        "text": text,
        "weights_version": weights_version,
        "sampling": dict(sampling) if sampling is not None else None,
        "source": source,
        "created_s": now,
    }


def task_row(
    kind: TaskKind,
    prompt_id: str,
    response_a: str,
    response_b: str | None,
    *,
    now: float,
    required_votes: int = 1,
    priority: int = 0,
    score: float = 0.0,
    gold: str | None = None,
    scale: int = 5,
    task_id: str | None = None,
) -> dict[str, Any]:
    """Its id is a hash of the kind and the responses, unless it has one already.

    Raises:
        Refused: bad_task.
    """
    check_kind(kind)
    if (kind == "pair") != (response_b is not None) or response_a == response_b:
        raise Refused("bad_task", f"a {kind} task takes {'two responses' if kind == 'pair' else 'one response'}")
    for name, value, least, most in (
        ("required_votes", required_votes, 0, 1_000_000),
        ("priority", priority, -1_000_000, 1_000_000),
        ("scale", scale, 2, 100),
    ):
        if type(value) is not int or not least <= value <= most:
            raise Refused("bad_task", f"{name} is {value!r:.60}, allowed is {least} to {most}")
    check_score(score)
    check_gold(gold, kind, scale)
    return {
        "id": task_id or digest("task", kind, response_a, response_b or ""),
        "kind": kind,
        "prompt_id": prompt_id,
        "response_a": response_a,
        "response_b": response_b,
        "required_votes": required_votes,
        "priority": priority,
        "score": float(score),
        "scale": scale,
        "gold": gold,
        "votes": 0,
        "open": gold is None and required_votes > 0,
        "created_s": now,
    }


def check_score(score: Any) -> None:
    if not is_number(score):
        raise Refused("bad_task", f"score is {score!r:.60}, allowed is a finite number")


def add_response(connection: Connection, row: dict[str, Any]) -> str:
    if connection.scalar(select(prompts.c.id).where(prompts.c.id == row["prompt_id"])) is None:
        raise Refused("unknown_prompt", f"there is no prompt {row['prompt_id']!r:.80}")
    insert_new(connection, responses, [row])
    return str(row["id"])


def add_task(connection: Connection, kind: TaskKind, response_a: str, response_b: str | None, **options: Any) -> str:
    """`options` as of `task_row`. The same task twice is one task, which stays as it was."""
    found: dict[str, str] = {}
    for response_id in filter(None, (response_a, response_b)):
        prompt_id = connection.scalar(select(responses.c.prompt_id).where(responses.c.id == response_id))
        if prompt_id is None:
            raise Refused("unknown_response", f"there is no response {response_id!r:.80}")
        found[response_id] = prompt_id
    if len(set(found.values())) > 1:
        raise Refused("bad_task", f"responses {response_a!r:.80} and {response_b!r:.80} answer different prompts")
    row = task_row(kind, found[response_a], response_a, response_b, **options)
    insert_new(connection, tasks, [row])
    return str(row["id"])


def set_scores(connection: Connection, scores: Mapping[str, float]) -> int:
    """Of tasks of equal priority the one with the higher score is asked first. Returns how many tasks there were."""
    for score in scores.values():
        check_score(score)
    if not scores:
        return 0
    change = update(tasks).where(tasks.c.id == bindparam("task")).values(score=bindparam("new"))
    return connection.execute(
        change, [{"task": task_id, "new": float(score)} for task_id, score in scores.items()]
    ).rowcount


def next_task(
    connection: Connection,
    annotator_id: int,
    *,
    now: float,
    lease_s: float,
    gold_rate: float,
    kinds: Collection[str],
    rng: random.Random,
) -> Assignment | None:
    """The task that the annotator holds already, else one of those still short of votes and leases; None: none left.

    Nobody is asked twice. A gold check takes the place of an ordinary task, at random with `gold_rate`.
    """
    for kind in kinds:
        check_kind(kind)
    check_lease_s(lease_s)
    if not 0 <= gold_rate <= 1:
        raise ValueError(f"gold_rate is {gold_rate}, allowed is 0 to 1")
    active_annotator(connection, annotator_id, lock=True)
    mine = (leases.c.annotator_id == annotator_id) & ~leases.c.ended & (leases.c.deadline_s > now)
    allowed = tasks.c.kind.in_(kinds)
    held = connection.scalar(select(leases.c.id).join(tasks).where(mine, allowed).order_by(leases.c.issued_s).limit(1))
    if held is not None:
        return assignment(connection, held)
    asked = exists().where(judgments.c.task_id == tasks.c.id, judgments.c.annotator_id == annotator_id, standing())
    task_id = _with_room(connection, and_(allowed, ~asked), now=now)
    if task_id is None:
        return None
    if rng.random() < gold_rate:
        unseen = connection.scalars(select(tasks.c.id).where(tasks.c.gold.is_not(None), allowed, ~asked)).all()
        task_id = rng.choice(unseen) if unseen else task_id
    return lease(connection, task_id, annotator_id, now=now, lease_s=lease_s, rng=rng)


def _with_room(connection: Connection, wanted: ColumnElement[bool], *, now: float) -> str | None:
    """The first task that is short of votes and leases, locked until this transaction ends.

    PostgreSQL: tasks that others hold are passed over at first, and waited for where there is nothing else. A query
    sees what was there when it began; whoever had the lock before may have taken the last place since, so it is counted
    again under the lock.
    """
    places = (
        select(func.count())
        .where(leases.c.task_id == tasks.c.id, ~leases.c.ended, leases.c.deadline_s > now)
        .scalar_subquery()
    )
    has_room = and_(tasks.c.open, tasks.c.votes + places < tasks.c.required_votes)
    first = (
        select(tasks.c.id)
        .where(wanted, has_room)
        .order_by(tasks.c.priority.desc(), tasks.c.score.desc(), tasks.c.id)
        .limit(1)
    )
    passing_over = True
    while True:
        task_id = connection.scalar(first.with_for_update(of=tasks, skip_locked=passing_over))
        if task_id is None and not passing_over:
            return None
        if task_id is None:
            passing_over = False
        elif connection.scalar(select(tasks.c.id).where(tasks.c.id == task_id, has_room)) is not None:
            return str(task_id)


def lease(
    connection: Connection, task_id: str, annotator_id: int, *, now: float, lease_s: float, rng: random.Random
) -> Assignment:
    kind = connection.scalar(select(tasks.c.kind).where(tasks.c.id == task_id))
    lease_id = secrets.token_urlsafe(16)
    row = {"id": lease_id, "task_id": task_id, "annotator_id": annotator_id, "ended": False}
    left = rng.choice("ab") if kind == "pair" else None
    row |= {"shown_left": left, "issued_s": now, "deadline_s": now + lease_s}
    connection.execute(insert(leases).values(row))
    return assignment(connection, lease_id)


def assignment(connection: Connection, lease_id: str) -> Assignment:
    row = connection.execute(
        select(
            leases.c.id, leases.c.shown_left, leases.c.deadline_s, tasks.c.id.label("task_id"), tasks.c.kind,
            tasks.c.scale, prompts.c.text, prompts.c.messages, _RESPONSE_A.c.text.label("text_a"),
            _RESPONSE_B.c.text.label("text_b"),
        )
        .select_from(leases)
        .join(tasks, leases.c.task_id == tasks.c.id)
        .join(prompts, tasks.c.prompt_id == prompts.c.id)
        .join(_RESPONSE_A, tasks.c.response_a == _RESPONSE_A.c.id)
        .outerjoin(_RESPONSE_B, tasks.c.response_b == _RESPONSE_B.c.id)
        .where(leases.c.id == lease_id)
    ).one()  # fmt: skip
    return Assignment(
        row.id, row.task_id, row.kind, row.text, row.messages, row.text_a, row.text_b, row.shown_left, row.scale,
        row.deadline_s,
    )  # fmt: skip


def check_lease_s(lease_s: float) -> None:
    if not 0 < lease_s <= MAX_LEASE_S:
        raise ValueError(f"lease_s is {lease_s}, allowed is more than 0 and at most {MAX_LEASE_S:g}")


def live_lease(connection: Connection, lease_id: str, annotator_id: int, *, now: float) -> Row[Any]:
    """The lease and its task.

    Raises:
        Refused: no_lease, lease_ended, lease_expired.
    """
    row = connection.execute(
        select(leases, tasks.c.kind, tasks.c.scale)
        .join(tasks)
        .where(leases.c.id == lease_id, leases.c.annotator_id == annotator_id)
        .with_for_update()
    ).one_or_none()
    if row is None:
        raise Refused("no_lease", f"annotator {annotator_id} holds no lease {lease_id!r:.40}")
    if row.ended:
        raise Refused("lease_ended", f"lease {lease_id} was used or given back")
    if row.deadline_s <= now:
        raise Refused("lease_expired", f"lease {lease_id} ended {now - row.deadline_s:.1f} s ago: ask for a task again")
    return row


def shown_left(connection: Connection, annotator_id: int, lease_id: str) -> Any:
    """Which response a lease shows or showed on the left; it may have ended."""
    row = connection.execute(
        select(leases.c.shown_left).where(leases.c.id == lease_id, leases.c.annotator_id == annotator_id)
    ).one_or_none()
    if row is None:
        raise Refused("no_lease", f"annotator {annotator_id} holds no lease {lease_id!r:.40}")
    return row.shown_left


def renew(connection: Connection, annotator_id: int, lease_id: str, *, now: float, lease_s: float) -> float:
    """The new deadline of a lease that still holds."""
    check_lease_s(lease_s)
    live_lease(connection, lease_id, annotator_id, now=now)
    connection.execute(update(leases).where(leases.c.id == lease_id).values(deadline_s=now + lease_s))
    return now + lease_s


def release(connection: Connection, annotator_id: int, lease_id: str, *, now: float) -> None:
    """Give it back unanswered: its place is free at once."""
    live_lease(connection, lease_id, annotator_id, now=now)
    end_lease(connection, lease_id)


def end_lease(connection: Connection, lease_id: str) -> None:
    connection.execute(update(leases).where(leases.c.id == lease_id).values(ended=True))


def count_votes(connection: Connection, task_id: str, more: int) -> None:
    """Votes of a task that came (1) or went (-1), and whether it is still open."""
    votes = tasks.c.votes + more
    is_open = and_(tasks.c.gold.is_(None), votes < tasks.c.required_votes)
    connection.execute(update(tasks).where(tasks.c.id == task_id).values(votes=votes, open=is_open))


def progress(connection: Connection, annotator_id: int) -> Progress:
    active_annotator(connection, annotator_id)
    skips = func.coalesce(func.sum((judgments.c.choice == "skip").cast(tasks.c.votes.type)), 0)
    counted, skipped = connection.execute(
        select(func.count(), skips).where(judgments.c.annotator_id == annotator_id, standing())
    ).one()
    of_all = totals(connection)
    return Progress(counted - skipped, skipped, of_all.votes, of_all.required_votes, of_all.open_tasks)


def totals(connection: Connection) -> Totals:
    of_all = select(
        func.coalesce(func.sum(tasks.c.votes), 0),
        func.coalesce(func.sum(tasks.c.required_votes), 0),
        func.coalesce(func.sum(tasks.c.open.cast(tasks.c.votes.type)), 0),
    )
    return Totals(*connection.execute(of_all.where(tasks.c.gold.is_(None), tasks.c.required_votes > 0)).one())


def digest(*parts: str) -> str:
    """128 bits that tell these texts from all others."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode()
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()[:32]
