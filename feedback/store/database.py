"""The database under a store: opening it, one transaction for each piece of work, and what its errors mean.

A new database gets the tables, any other must have exactly these.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, insert, inspect, make_url, select
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
)

from contracts.disk import DiskFull, room
from feedback.store.records import Refused
from feedback.store.schema import STORE_SCHEMA_VERSION, meta, metadata

T = TypeVar("T")
_OPENING = 0x68656164726163  # any number will do: locks of this kind have nothing but one
_ATTEMPTS = 5
_AGAIN = ("40001", "40P01")  # PostgreSQL: two transactions that needed each other's locks; one was undone
_DISK_FULL = "53100"


class Database:
    """Transactions on the tables of a store; `reader` and `writer` begin one each.

    A writer waits for the others, for `busy_s` at most, and is then refused with the code "busy".

    Raises:
        Refused: not_a_store, schema, busy.
    """

    def __init__(self, place: str | Path, *, busy_s: float) -> None:
        self.engine = connect(place, busy_s=busy_s)
        self.writer = self.engine.execution_options(writes=True)
        snapshots = {} if self.engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        self.reader = self.engine.execution_options(**snapshots)

    def close(self) -> None:
        self.engine.dispose()

    def forget_log(self) -> None:
        """Leave nothing of deleted rows in SQLite's write-ahead log."""
        if self.engine.dialect.name == "sqlite":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` finds in one snapshot."""
        try:
            with self.reader.begin() as connection:
                return _checked(work, connection)
        except OperationalError as error:
            if unreachable(error):
                raise _away() from error
            raise

    def write(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns once all that it changed is on disk. It is tried again where another was first."""
        for attempt in range(_ATTEMPTS):
            try:
                with self.writer.begin() as connection:
                    return _checked(work, connection)
            except IntegrityError:
                # PostgreSQL: another transaction was first with the same key or vote; the next look finds it.
                if attempt == _ATTEMPTS - 1:
                    raise
            except OperationalError as error:
                if waited_too_long(error):
                    raise Refused("busy", "others wrote for too long: try again") from error
                if unreachable(error):
                    raise _away() from error
                if "disk is full" in str(error.orig):
                    folder = Path(self.engine.url.database or ".").parent
                    raise DiskFull(f"the store could not write: {room(folder)}") from error
                if sqlstate(error) == _DISK_FULL:
                    raise DiskFull("the store could not write: the disk of the database's server is full") from error
                if sqlstate(error) not in _AGAIN or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")


def _away() -> Refused:
    return Refused("busy", "the database does not answer: try again, a vote with the same idempotency key")


def _checked(work: Callable[[Connection], T], connection: Connection) -> T:
    """What no column takes, as an id say, is refused like everything else that is wrong."""
    try:
        return work(connection)
    except UnicodeEncodeError as error:
        raise Refused("bad_text", "half a surrogate pair is no text") from error
    except (OverflowError, DataError) as error:  # DataError: PostgreSQL's way of saying so
        raise Refused("bad_value", "a number of more than 64 bits") from error


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
