"""The database behind the store: SQLite in the feedback folder, or a PostgreSQL that several servers share.

    database = Database.open(Path("feedback"), None)
    with database.writing() as connection: ...        # one transaction: all of it, or nothing
    with database.reading() as connection: ...

SQLite keeps a write-ahead log, waits for other writers, and overwrites what is deleted. A database made by a newer
version of this code is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from marwright.errors import DataError, SettingsError
from marwright.feedback import tables
from marwright.release import journal

VARIABLE = "MARWRIGHT_DATABASE"
FILE = "feedback.sqlite"
BUSY_SECONDS = 30.0
SOCKET_SECONDS = 120.0
"""Longest silence of a PostgreSQL."""
CHUNK = 500
"""Values of one `in (…)`, and rows of one insert: below every driver's limit."""
_INCREMENTAL = 2
_ROWS = 500
"""Of one statement in PostgreSQL."""
_TURN = 5_033_164_721
"""Key of the PostgreSQL lock that a writer holds: what is forgotten while another server ingests stays forgotten, and
two that store the same labels do not wait for each other in turns."""

Row = dict[str, Any]


class Database:
    """An open database; see `open`."""

    def __init__(self, engine: sa.Engine, name: str) -> None:
        self._engine = engine
        self.name = name
        """In words, without the password."""

    @classmethod
    def open(cls, folder: Path, url: str | None) -> Self:
        """The URL's, else the one that MARWRIGHT_DATABASE names, else a SQLite file in `folder`; made if need be.

        SettingsError for a URL that nothing here can open, DataError for a database that cannot be used.
        """
        given = url or os.environ.get(VARIABLE)
        address = _parsed(given) if given else URL.create("sqlite", database=str(folder / FILE))
        name = address.render_as_string(hide_password=True) if given else str(folder / FILE)
        made = cls(_engine(address), name)
        with made.told():
            if made.file is not None:
                made.file.parent.mkdir(parents=True, exist_ok=True)
                kind = journal.filesystem(made.file.parent)
                if kind in journal.NETWORK:
                    raise DataError(
                        f"{name} would be on a network file system ({kind}), where SQLite's locks do not hold",
                        hint=f"use a local disk, or a PostgreSQL: {VARIABLE}=postgresql://…",
                    )
            made._check()
        return made

    @property
    def file(self) -> Path | None:
        """SQLite's file; None of a PostgreSQL."""
        path = self._engine.url.database
        return Path(path) if self.sqlite and path and path != ":memory:" else None

    @property
    def sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    @property
    def bytes(self) -> int:
        """On disk, as far as the database says."""
        if self.sqlite:
            return sum(one.stat().st_size for one in self._files() if one.exists())
        with self.reading() as connection:
            return int(connection.scalar(sa.text("select pg_database_size(current_database())")) or 0)

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction; rolled back on any error. One writer at a time, in either database."""
        with (
            self.told(ours=False),
            self._engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            if not self.sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_TURN)))
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One view of the data, however long it is looked at."""
        with self.told(), self._engine.connect() as connection, connection.begin():
            if not self.sqlite:
                connection.exec_driver_sql("set transaction isolation level repeatable read, read only")
            yield connection

    def insert(self, connection: sa.Connection, table: sa.Table, rows: Sequence[Row]) -> None:
        """Those rows whose key is not there yet."""
        if self.sqlite:
            if rows:
                connection.execute(sqlite.insert(table).on_conflict_do_nothing(), rows)
            return
        for start in range(0, len(rows), _ROWS):  # a statement for each row would be a journey for each
            some = list(rows[start : start + _ROWS])
            connection.execute(postgresql.insert(table).values(some).on_conflict_do_nothing())

    def shrink(self, *, whole: bool = False) -> None:
        """Give deleted space back. `whole`: leave no byte of it anywhere in the database's files."""
        with self.told():
            if self.sqlite:
                self._shrink_file(whole=whole)
                return
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                for table in tables.metadata.sorted_tables:
                    connection.exec_driver_sql(f"vacuum {'full ' if whole else ''}{table.name}")

    @contextlib.contextmanager
    def told(self, *, ours: bool = True) -> Iterator[None]:
        """Trouble with the database, said in our words: SQLAlchemy's have the statement, its values, and a link.

        Not `ours`: a file that an OSError names is none of the database's, and somebody else speaks of it.
        """
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            if not ours and isinstance(error, OSError) and error.filename is not None:
                raise
            why = getattr(error, "orig", None) or error
            words = why.args[0].get("M", why) if why.args and isinstance(why.args[0], dict) else why
            raise DataError(
                f"the feedback database {self.name} cannot be used: {words}",
                hint="is it on a writable local disk?"
                if self.sqlite
                else f"is it up? {VARIABLE} or --database names it",
            ) from None

    def _check(self) -> None:
        """Make the tables where there are none; refuse those of a newer version."""
        with self.reading() as connection:
            there = sa.inspect(connection).has_table(tables.meta.name)
        if not there:
            with self.writing() as connection:
                tables.metadata.create_all(connection)
                self.insert(connection, tables.meta, [{"name": "schema", "value": str(tables.SCHEMA)}])
        with self.reading() as connection:
            schema = int(connection.scalar(sa.select(tables.meta.c.value).filter_by(name="schema")) or 0)
        if schema > tables.SCHEMA:
            raise DataError(
                f"{self.name} was made by a newer version (schema {schema}, this one knows {tables.SCHEMA})",
                hint="use that version, or another folder: --feedback PATH",
            )

    def _shrink_file(self, *, whole: bool) -> None:
        with self._engine.connect().execution_options(plain=True) as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.executescript("vacuum;" if whole else "pragma incremental_vacuum;")  # `execute` frees one page
            busy = driver.execute("pragma wal_checkpoint(truncate)").fetchone()[0]
        if busy and whole:
            raise DataError(
                f"{self.name} is being read by another process: its log still holds what was deleted",
                hint="run the same command again",
            )

    def _files(self) -> list[Path]:
        file = self.file
        return [] if file is None else [file, file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")]


def chunks(values: Iterable[str]) -> Iterator[list[str]]:
    """For one `in (…)` each; sorted, so that two writers cannot wait for each other's rows in turns."""
    ordered = sorted(set(values))
    for start in range(0, len(ordered), CHUNK):
        yield ordered[start : start + CHUNK]


def found(connection: sa.Connection, column: sa.Column[Any], values: Iterable[str]) -> set[str]:
    """Those of `values` that the column has."""
    return {
        value
        for some in chunks(values)
        for value in connection.scalars(sa.select(column).where(column.in_(some)).distinct())
    }


def _parsed(text: str) -> URL:
    try:
        address = make_url(text)
    except ArgumentError:  # whose words may be the whole text, password and all
        raise SettingsError(
            "the feedback database's URL cannot be read", hint=f"{VARIABLE}=postgresql://user:password@host/name"
        ) from None
    if address.drivername in ("postgresql", "postgres"):
        return address.set(drivername="postgresql+pg8000")
    if address.get_backend_name() not in ("sqlite", "postgresql"):
        raise SettingsError(
            f"the feedback database's URL is for {address.get_backend_name()!r}",
            hint=f"SQLite and PostgreSQL are supported: {VARIABLE}=postgresql://user:password@host/name",
        )
    return address


def _engine(address: URL) -> sa.Engine:
    sqlite_ = address.get_backend_name() == "sqlite"
    options: Mapping[str, Any] = {"timeout": BUSY_SECONDS} if sqlite_ else {"timeout": SOCKET_SECONDS}
    if not sqlite_ and address.get_driver_name() != "pg8000":
        options = {}
    try:
        engine = sa.create_engine(
            address, connect_args=dict(options), hide_parameters=True, insertmanyvalues_page_size=CHUNK
        )
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise SettingsError(
            f"the feedback database is a {address.get_backend_name()}, and its driver is not installed: {error}",
            hint="install the extra: pip install -e '.[postgres]'",
        ) from None
    if sqlite_:
        event.listen(engine, "connect", _prepared)
        event.listen(engine, "begin", _begun)
    else:
        # pg8000 would send rows one by one.
        engine.dialect.use_insertmanyvalues_wo_returning = True
    return engine


def _prepared(connection: Any, record: object) -> None:
    connection.isolation_level = None  # begun by `_begun`
    if connection.execute("pragma auto_vacuum").fetchone()[0] != _INCREMENTAL:  # to say it takes a writer's turn
        connection.execute(f"pragma auto_vacuum = {_INCREMENTAL}")  # heeded before the first table alone
    for statement in (
        "pragma journal_mode = wal",
        "pragma synchronous = full",  # labels were promised to their senders
        "pragma foreign_keys = on",
        "pragma secure_delete = on",
    ):
        connection.execute(statement)


def _begun(connection: sa.Connection) -> None:
    """A writer takes its turn at once: one that begins by reading would be refused later."""
    options = connection.get_execution_options()
    if not options.get("plain"):
        connection.exec_driver_sql("begin immediate" if options.get("writes") else "begin")
