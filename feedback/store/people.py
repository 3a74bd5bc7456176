"""Annotators: known by a token of which only the hash is kept; their data leaves with them."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, select, update

from feedback.store.records import Gap, Person, Refused, check_text
from feedback.store.schema import add_row, annotators, gaps, judgments, leases, prompts, responses, tasks


def register(connection: Connection, name: str, *, now: float) -> tuple[int, str]:
    """(annotator id, token). The token is shown here and never again."""
    check_text("name", name, max_chars=200, blank=False)
    if connection.scalar(select(annotators.c.id).where(annotators.c.name == name)) is not None:
        raise Refused("name_taken", f"there is an annotator {name!r} already")
    token = secrets.token_urlsafe(32)
    row = {"name": name, "token_hash": token_hash(token), "active": True, "created_s": now}
    return add_row(connection, annotators, row), token


def new_token(connection: Connection, annotator_id: int) -> str:
    """Another token in the place of the old one."""
    active_annotator(connection, annotator_id)
    token = secrets.token_urlsafe(32)
    connection.execute(update(annotators).where(annotators.c.id == annotator_id).values(token_hash=token_hash(token)))
    return token


def authenticate(connection: Connection, token: str) -> int:
    """The annotator of the token. What the time of the look-up tells is about the hash, not the token."""
    check_text("token", token, max_chars=500)
    found = connection.scalar(
        select(annotators.c.id).where(annotators.c.token_hash == token_hash(token), annotators.c.active)
    )
    if found is None:
        raise Refused("unknown_annotator", "the token is nobody's: ask for a new one")
    return int(found)


def set_active(connection: Connection, annotator_id: int, active: bool) -> None:
    """Who is not active is neither asked nor heard; what they said before stands."""
    changed = connection.execute(update(annotators).where(annotators.c.id == annotator_id).values(active=active))
    if not changed.rowcount:
        raise Refused("unknown_annotator", f"there is no annotator {annotator_id}")


def active_annotator(connection: Connection, annotator_id: int, *, lock: bool = False) -> None:
    query = select(annotators.c.active).where(annotators.c.id == annotator_id)
    if not connection.scalar(query.with_for_update() if lock else query):
        raise Refused("unknown_annotator", f"there is no active annotator {annotator_id!r:.40}")


def named_annotators(connection: Connection, names: set[str], *, now: float) -> dict[str, int]:
    """Ids of these annotators, who are made without a token where they are new (imports, simulated voters)."""
    known = _ids(connection, names)
    rows = [{"name": name, "active": True, "created_s": now} for name in sorted(names - known.keys())]
    if rows:
        connection.execute(insert(annotators), rows)
        known |= _ids(connection, names - known.keys())
    return known


def _ids(connection: Connection, names: set[str]) -> dict[str, int]:
    found = connection.execute(select(annotators.c.name, annotators.c.id).where(annotators.c.name.in_(names)))
    return {row.name: row.id for row in found}


def find(connection: Connection, name: str) -> int:
    """The annotator of that name. Raises Refused (unknown_annotator)."""
    found = connection.scalar(select(annotators.c.id).where(annotators.c.name == name))
    if found is None:
        raise Refused("unknown_annotator", f"there is no annotator {name!r:.80}")
    return int(found)


def everybody(connection: Connection) -> list[Person]:
    """All annotators in the order in which they came."""
    later = judgments.alias()
    stands = and_(
        judgments.c.annotator_id == annotators.c.id,
        judgments.c.act == "vote",
        ~select(later.c.id).where(later.c.supersedes == judgments.c.id).exists(),
    )
    votes = select(func.count()).where(stands).correlate(annotators).scalar_subquery()
    columns = (annotators.c.id, annotators.c.name, annotators.c.active, annotators.c.token_hash.is_not(None), votes)
    return [Person(*row) for row in connection.execute(select(*columns).order_by(annotators.c.id))]


def export(connection: Connection, annotator_id: int) -> dict[str, Any]:
    """All that is stored of one person, ready for JSON: every judgment, undone ones too, with what it was about."""
    person = connection.execute(select(annotators).where(annotators.c.id == annotator_id)).one_or_none()
    if person is None:
        raise Refused("unknown_annotator", f"there is no annotator {annotator_id}")
    a, b = responses.alias(), responses.alias()
    texts = (tasks.c.kind, prompts.c.text.label("prompt"), a.c.text.label("a"), b.c.text.label("b"))
    said = connection.execute(
        select(judgments, *texts)
        .select_from(judgments)
        .join(tasks, judgments.c.task_id == tasks.c.id)
        .join(prompts, tasks.c.prompt_id == prompts.c.id)
        .join(a, tasks.c.response_a == a.c.id)
        .outerjoin(b, tasks.c.response_b == b.c.id)
        .where(judgments.c.annotator_id == annotator_id)
        .order_by(judgments.c.id)
    )
    held = connection.execute(select(leases).where(leases.c.annotator_id == annotator_id).order_by(leases.c.issued_s))
    return {
        "annotator": {"id": person.id, "name": person.name, "active": person.active, "created_s": person.created_s},
        "judgments": [dict(row) for row in said.mappings()],
        "leases": [dict(row) for row in held.mappings()],
    }


def forget(connection: Connection, annotator_id: int, *, now: float) -> Gap:
    """Delete the annotator with all judgments and leases. Their tasks are short of votes again; the gap is counted."""
    from_here = judgments.c.annotator_id == annotator_id
    if connection.scalar(select(annotators.c.id).where(annotators.c.id == annotator_id).with_for_update()) is None:
        raise Refused("unknown_annotator", f"there is no annotator {annotator_id}")
    later = judgments.alias()
    counts = and_(
        from_here,
        judgments.c.act == "vote",
        func.coalesce(judgments.c.choice, "") != "skip",
        ~select(later.c.id).where(later.c.supersedes == judgments.c.id).exists(),
    )
    voted = select(judgments.c.task_id).where(counts)
    total, about = connection.execute(
        select(func.count(), func.count(judgments.c.task_id.distinct())).where(from_here)
    ).one()
    left = tasks.c.votes - 1
    votes = connection.execute(
        update(tasks)
        .where(tasks.c.id.in_(voted))
        .values(votes=left, open=and_(tasks.c.gold.is_(None), left < tasks.c.required_votes))
    ).rowcount
    connection.execute(delete(judgments).where(from_here))
    connection.execute(delete(leases).where(leases.c.annotator_id == annotator_id))
    connection.execute(delete(annotators).where(annotators.c.id == annotator_id))
    row = {"judgments": total, "votes": votes, "tasks": about, "deleted_s": now}
    return Gap(add_row(connection, gaps, row), total, votes, about, now)


def all_gaps(connection: Connection) -> list[Gap]:
    return [Gap(*row) for row in connection.execute(select(gaps).order_by(gaps.c.id))]


def token_hash(token: str) -> str:
    """Tokens are 256 random bits: no salt and no slow hash are needed, nobody can guess one."""
    return hashlib.sha256(token.encode()).hexdigest()
