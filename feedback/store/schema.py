"""The tables, and opening them: a new file gets them, any other must have exactly these.

Judgments are only ever added. What they supersede stays; the one exception is a person who wants their data deleted
(`people.delete`). `tasks.votes` and `tasks.open` follow from the judgments and change in the same transaction.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Double,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, NoSuchModuleError, OperationalError

from feedback.store.records import Refused

STORE_SCHEMA_VERSION = 1
ROWS_AT_ONCE = 2_000  # in one statement; SQLite takes 32,766 values
_OPENING = 0x68656164726163  # any number will do: locks of this kind have nothing but one

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


def absolute(place: str) -> str:
    """The same place for a process that runs in another folder."""
    if "://" not in place:
        return str(Path(place).resolve())
    url = _url(place)
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return place
    return url.set(database=str(Path(str(url.database)).resolve())).render_as_string(hide_password=False)


def file_of(place: str) -> Path | None:
    """Where an SQLite store is; None where the place is the URL of a server. Raises Refused (not_a_store)."""
    if "://" not in place:
        return Path(place)
    url = _url(place)
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def _url(text: str) -> URL:
    try:
        return make_url(text)
    except ArgumentError as error:
        raise Refused("not_a_store", f"{text}: neither a path nor the URL of a database") from error


def connect(place: str | Path, *, busy_s: float) -> Engine:
    """An engine on tables of this version, made where the database is empty.

    Raises:
        Refused: not_a_store, schema, busy.
    """
    text = str(place)
    if "://" not in text:
        Path(text).parent.mkdir(parents=True, exist_ok=True)
        text = f"sqlite:///{text}"
    url = _url(text)
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise Refused("not_a_store", "a store in memory would lose what it acknowledged: give it a file")
        engine = create_engine(url, connect_args={"timeout": busy_s, "check_same_thread": False}, max_overflow=-1)
        event.listen(engine, "connect", lambda connection, _: _prepare_sqlite(connection, busy_s))
        event.listen(engine, "begin", _begin_sqlite)
    else:
        engine = _server_engine(url, busy_s)
    try:
        with engine.execution_options(writes=True).begin() as connection:
            _check_or_create(connection, url.render_as_string())
    except OperationalError as error:
        engine.dispose()
        said = " ".join(str(error.orig).split())
        code = "busy" if waited_too_long(error) else "not_a_store"
        raise Refused(code, f"{url.render_as_string()}: cannot be opened: {said}") from error  # type: ignore[arg-type]
    except DatabaseError as error:
        engine.dispose()
        said = " ".join(str(error.orig).split())
        raise Refused("not_a_store", f"{url.render_as_string()}: is no database of ours: {said}") from error
    except Refused:
        engine.dispose()
        raise
    return engine


def _server_engine(url: URL, busy_s: float) -> Engine:
    """Of a PostgreSQL: who waits for a lock, or for a network that is gone, gives up after `busy_s`."""
    wait_ms = max(1, round(1000 * busy_s))
    bounded: dict[str, Any] = {"connect_timeout": max(2, round(busy_s)), "tcp_user_timeout": wait_ms}
    bounded["options"] = f"{url.query.get('options', '')} -c lock_timeout={wait_ms}".strip()
    try:
        return create_engine(url, pool_pre_ping=True, max_overflow=-1, connect_args=bounded)
    except (ImportError, NoSuchModuleError) as error:
        advice = "for postgresql+psycopg:// it is pip install 'headrace[postgresql]'"
        raise Refused("not_a_store", f"{url.render_as_string()}: its driver is not here ({error}): {advice}") from error


def _prepare_sqlite(connection: Any, busy_s: float) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says, not at the first INSERT
    deadline = time.monotonic() + busy_s
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except connection.OperationalError as error:
            # switching a new file to WAL does not wait for others that do the same
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    if mode != "wal":
        raise Refused("not_a_store", f"SQLite keeps no write-ahead log there (journal_mode {mode}): use a local disk")
    connection.execute("PRAGMA synchronous = FULL")  # fsync at each commit: also a machine that dies loses none
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(
        "PRAGMA cache_size = -65536"
    )  # KiB at most: keys are hashes, a large import is all over its trees
    connection.execute("PRAGMA secure_delete = ON")  # what a person wants deleted does not stay in free pages


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its turn at once: one that reads first could find its snapshot outdated and fail.
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def sqlstate(error: DBAPIError) -> str:
    """PostgreSQL's code of what went wrong (its manual, appendix A); "" of other databases."""
    return getattr(error.orig, "sqlstate", None) or ""  # the one name that drivers share


def waited_too_long(error: DBAPIError) -> bool:
    """Whether others held what this one needed, until its patience ended."""
    if isinstance(error.orig, sqlite3.Error):
        return "locked" in str(error.orig)
    return sqlstate(error) == "55P03"


def unreachable(error: DBAPIError) -> bool:
    """Whether a server is gone, or goes, so that nobody knows what became of a transaction that was being committed."""
    state = sqlstate(error)
    of_a_server = error.orig is not None and not isinstance(error.orig, sqlite3.Error)
    return of_a_server and (error.connection_invalidated or state == "" or state.startswith(("08", "57P")))


def _check_or_create(connection: Connection, name: str) -> None:
    if connection.dialect.name == "postgresql":  # who opens a new one at the same time waits; SQLite's writers do
        connection.execute(select(func.pg_advisory_xact_lock(_OPENING)))
    there = set(inspect(connection).get_table_names())
    if not there:
        metadata.create_all(connection)
        connection.execute(insert(meta).values(key="schema_version", value=str(STORE_SCHEMA_VERSION)))
        return
    if "meta" not in there:
        raise Refused("not_a_store", f"{name}: holds other tables and no store ({', '.join(sorted(there)[:5])})")
    version = connection.scalar(select(meta.c.value).where(meta.c.key == "schema_version"))
    if version != str(STORE_SCHEMA_VERSION):
        raise Refused(
            "schema",
            f"{name}: has store schema {version}, this Headrace reads {STORE_SCHEMA_VERSION}: use the Headrace that "
            "wrote it, or export there and import here",
        )
    inspector = inspect(connection)
    for table in metadata.sorted_tables:
        columns = inspector.get_columns(table.name) if table.name in there else []
        found = {column["name"] for column in columns}
        if found != set(table.columns.keys()):
            missing = ", ".join(sorted(found ^ set(table.columns.keys()))[:5])
            raise Refused("schema", f"{name}: table {table.name} is not that of store schema {version}: {missing}")


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
