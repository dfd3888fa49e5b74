"""Databases made for one test run, looked at from outside the workers."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import URL, NullPool, create_engine, event, text

from support.project.models import Base
from support.waiting import eventually

_ACTIVE = re.compile(r"\d+, ACTIVE")
_THREAD = re.compile(r"thread id (\d+)")
OBSERVER = "observer"  # application_name of the connections that only look


class ServerConnection(NamedTuple):
    """A connection as the server lists it."""

    pid: int
    state: str
    query: str


class Database:
    """A database of this test run; its own connection is not one of a worker's."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self.engine = create_engine(self._observer(url), isolation_level="AUTOCOMMIT", pool_size=1)

    def url(self, worker: str) -> str:
        """Return the URL a worker called `worker` connects with."""
        return self._url.render_as_string(hide_password=False)

    def execute(self, sql: str, **parameters: Any) -> None:
        with self.engine.connect() as connection:
            connection.execute(text(sql), parameters)

    def column(self, sql: str, **parameters: Any) -> list[Any]:
        """Return the first column of what `sql` selects."""
        with self.engine.connect() as connection:
            return list(connection.scalars(text(sql), parameters))

    def rows(self, key: str) -> list[str]:
        """Return the notes of the committed rows of `key`, in the order in which they were inserted."""
        return self.column("SELECT note FROM rows_ WHERE key_ = :key ORDER BY id", key=key)

    def connections(self, worker: str) -> list[ServerConnection]:
        """Return what the server lists of the worker's connections."""
        return []

    def busy(self, worker: str) -> list[ServerConnection]:
        """Return those of the worker's connections that are in a statement or a transaction."""
        return []

    def _observer(self, url: URL) -> URL:
        return url


class PostgreSQL(Database):
    def url(self, worker: str, driver: str = "psycopg") -> str:
        named = self._url.update_query_dict({"application_name": worker}).set(drivername=f"postgresql+{driver}")
        return named.render_as_string(hide_password=False)

    def connections(self, worker: str) -> list[ServerConnection]:
        sql = "SELECT pid, coalesce(state, ''), query FROM pg_stat_activity WHERE application_name = :worker"
        with self.engine.connect() as connection:
            return [ServerConnection(*row) for row in connection.execute(text(sql), {"worker": worker})]

    def busy(self, worker: str) -> list[ServerConnection]:
        return [connection for connection in self.connections(worker) if connection.state != "idle"]

    def _observer(self, url: URL) -> URL:
        return url.update_query_dict({"application_name": OBSERVER})


class MariaDB(Database):
    """One database per worker: that is how the server tells the workers apart."""

    def connections(self, worker: str) -> list[ServerConnection]:
        sql = (
            "SELECT id, command, coalesce(info, '') FROM information_schema.processlist"
            " WHERE db = :name AND id <> CONNECTION_ID()"
        )
        with self.engine.connect() as connection:
            return [ServerConnection(*row) for row in connection.execute(text(sql), {"name": self._url.database})]

    def busy(self, worker: str) -> list[ServerConnection]:
        # Not from information_schema.innodb_trx, which stays as it is while anybody reads it every 0.1 s.
        with self.engine.connect() as connection:
            status = connection.exec_driver_sql("SHOW ENGINE INNODB STATUS").one()[2]
        active = [part for part in status.split("---TRANSACTION ") if _ACTIVE.match(part)]
        transactions = {int(number) for part in active for number in _THREAD.findall(part)[:1]}
        return [c for c in self.connections(worker) if c.state != "Sleep" or c.pid in transactions]


class SQLite(Database):
    """A file; no server that could list connections."""


@contextlib.contextmanager
def new_postgresql(server: URL, name: str) -> Iterator[PostgreSQL]:
    """Create a database with the tables of the project, drop it at the end."""
    admin = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    database = PostgreSQL(server.set(database=name))
    try:
        Base.metadata.create_all(database.engine)
        yield database
    finally:
        database.engine.dispose()
        with admin.connect() as connection:
            connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


@contextlib.contextmanager
def new_mariadb(server: URL, name: str) -> Iterator[MariaDB]:
    """Create a database with the tables of the project, drop it at the end."""
    admin = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE `{name}`"))
    database = MariaDB(server.set(database=name))
    try:
        Base.metadata.create_all(database.engine)
        yield database
    finally:
        database.engine.dispose()
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE `{name}`"))


@contextlib.contextmanager
def new_sqlite(path: Path) -> Iterator[SQLite]:
    """Create a file database with the tables of the project."""
    database = SQLite(URL.create("sqlite", database=str(path)))

    @event.listens_for(database.engine, "connect")
    def wait_for_writers(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA busy_timeout = 10000")

    try:
        Base.metadata.create_all(database.engine)
        yield database
    finally:
        database.engine.dispose()


def assert_no_connections(database: Database, worker: str) -> None:
    """Fail unless the server soon lists no connection of the worker."""
    left: list[ServerConnection] = []

    def none_left() -> bool:
        left[:] = database.connections(worker)
        return not left

    with contextlib.suppress(AssertionError):
        eventually(none_left, "no connection left")
    assert not left, f"the server still lists connections of {worker}: {left}"


def assert_not_busy(database: Database, worker: str) -> None:
    """Fail unless the worker soon has no connection in a statement or a transaction."""
    left: list[ServerConnection] = []

    def none_busy() -> bool:
        left[:] = database.busy(worker)
        return not left

    with contextlib.suppress(AssertionError):
        eventually(none_busy, "no connection busy")
    assert not left, f"connections of {worker} are still in a statement or a transaction: {left}"
