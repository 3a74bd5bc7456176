"""The tables of a store.

Judgments are only ever added. What they supersede stays; the one exception is a person who wants their data deleted
(`people.delete`). `tasks.votes` and `tasks.open` follow from the judgments and change in the same transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    insert,
)
from sqlalchemy.dialects import postgresql, sqlite

STORE_SCHEMA_VERSION = 1
ROWS_AT_ONCE = 2_000  # in one statement; SQLite takes 32,766 values

_NUMBER = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows in an INTEGER column only
metadata = MetaData()

meta = Table("meta", metadata, Column("key", Text, primary_key=True), Column("value", Text, nullable=False))

prompts = Table(
    "prompts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),  # what a file or a run calls it
    Column("text", Text, nullable=False),
    Column("messages", JSON),
    Column("domain", Text, nullable=False),
    Column("created_s", Double, nullable=False),
)

responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("prompt_id", ForeignKey("prompts.id"), nullable=False),
    Column("text", Text, nullable=False),
    Column("weights_version", _NUMBER),
    Column("sampling", JSON),
    Column("source", Text, nullable=False),
    Column("created_s", Double, nullable=False),
    CheckConstraint("source IN ('live', 'versions', 'file')"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("prompt_id", ForeignKey("prompts.id"), nullable=False),
    Column("response_a", ForeignKey("responses.id"), nullable=False),
    Column("response_b", ForeignKey("responses.id")),
    Column("required_votes", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("score", Double, nullable=False),
    Column("scale", Integer, nullable=False),
    Column("gold", Text),
    Column("votes", Integer, nullable=False),  # standing judgments that are no skips
    Column("open", Boolean, nullable=False),  # votes < required_votes; never of a gold check
    Column("created_s", Double, nullable=False),
    CheckConstraint("kind IN ('pair', 'label', 'rating', 'thumbs', 'correction')"),
    CheckConstraint("(kind = 'pair') = (response_b IS NOT NULL)"),
)
Index("tasks_to_ask", tasks.c.open, tasks.c.priority.desc(), tasks.c.score.desc(), tasks.c.id)
Index("tasks_gold", tasks.c.id, sqlite_where=tasks.c.gold.is_not(None), postgresql_where=tasks.c.gold.is_not(None))

annotators = Table(
    "annotators",
    metadata,
    Column("id", _NUMBER, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("token_hash", Text, unique=True),  # NULL: nobody can sign in as this one
    Column("active", Boolean, nullable=False),
    Column("created_s", Double, nullable=False),
    sqlite_autoincrement=True,
)

leases = Table(
    "leases",
    metadata,
    Column("id", Text, primary_key=True),
    Column("task_id", ForeignKey("tasks.id"), nullable=False),
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False),
    Column("shown_left", Text),
    Column("issued_s", Double, nullable=False),
    Column("deadline_s", Double, nullable=False),
    Column("ended", Boolean, nullable=False),  # used or given back
    CheckConstraint("shown_left IN ('a', 'b')"),
)
Index("leases_of_task", leases.c.task_id, leases.c.ended)
Index("leases_of_annotator", leases.c.annotator_id, leases.c.ended)

judgments = Table(
    "judgments",
    metadata,
    Column("id", _NUMBER, primary_key=True),
    Column("task_id", ForeignKey("tasks.id"), nullable=False),
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False),
    Column("revision", Integer, nullable=False),  # 0, 1, ... of this person on this task
    Column("supersedes", ForeignKey("judgments.id"), unique=True),  # the revision before it
    Column("act", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("lease_id", Text),
    Column("shown_left", Text),
    Column("choice", Text),
    Column("value", Double),
    Column("text", Text),
    Column("strength", Integer),
    Column("aspects", JSON),
    Column("rationale", Text, nullable=False),
    Column("active_s", Double),
    Column("client_version", Text, nullable=False),
    Column("guideline_version", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("created_s", Double, nullable=False),
    UniqueConstraint("annotator_id", "idempotency_key"),
    UniqueConstraint("task_id", "annotator_id", "revision"),  # one vote a person a task, whatever races
    CheckConstraint("act IN ('vote', 'undo')"),
    CheckConstraint("origin IN ('asked', 'served', 'imported')"),
    CheckConstraint("choice IN ('a', 'b', 'tie', 'both_bad', 'skip')"),
    CheckConstraint("shown_left IN ('a', 'b')"),
    sqlite_autoincrement=True,
)

gaps = Table(
    "gaps",
    metadata,
    Column("id", _NUMBER, primary_key=True),
    Column("judgments", Integer, nullable=False),
    Column("votes", Integer, nullable=False),
    Column("tasks", Integer, nullable=False),
    Column("deleted_s", Double, nullable=False),
    sqlite_autoincrement=True,
)

aggregate_runs = Table(
    "aggregate_runs",
    metadata,
    Column("id", _NUMBER, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("version", Text, nullable=False),  # of the method
    Column("tasks", Integer, nullable=False),
    Column("judgments", Integer, nullable=False),
    Column("last_judgment_id", _NUMBER, nullable=False),
    Column("gaps", Integer, nullable=False),
    Column("created_s", Double, nullable=False),
    sqlite_autoincrement=True,
)

aggregates = Table(
    "aggregates",
    metadata,
    Column("run_id", ForeignKey("aggregate_runs.id"), primary_key=True),
    Column("task_id", ForeignKey("tasks.id"), primary_key=True),
    Column("probability", Double, nullable=False),  # of a, or of good; of a rating where it lies between 1 and scale
    Column("votes_a", Integer, nullable=False),
    Column("votes_b", Integer, nullable=False),
    Column("both_bad", Integer, nullable=False),
    Column("votes", Integer, nullable=False),
)

datasets = Table(
    "datasets",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("query", JSON, nullable=False),
    Column("content_hash", Text, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("dropped", JSON, nullable=False),
    Column("gaps", Integer, nullable=False),
    Column("created_s", Double, nullable=False),
)


def add_row(connection: Connection, table: Table, row: Mapping[str, Any]) -> int:
    """The number of the new row."""
    key = connection.execute(insert(table).values(row)).inserted_primary_key
    assert key is not None  # of one row there is one
    return int(key[0])


def insert_new(connection: Connection, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    """Insert rows; what has the key of one that is there already is left as it is."""
    adding: Any = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)
    batch = list(rows)
    if batch:
        connection.execute(adding.on_conflict_do_nothing(), batch)
