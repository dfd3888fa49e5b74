"""The database server of a run: what the user gives, or one of its own; and fresh databases on it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
from sqlalchemy import URL, Connection, create_engine, insert, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from ..errors import ServiceError
from ..tasks.models import Account, Base
from .proxy import distant
from .rundir import RunDirectory
from .servers import MariaDBServer, PostgreSQLServer

#: SQLAlchemy 2.0 and 2.1 disagree on the driver that "postgresql" means.
DEFAULT_DRIVERS = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg",
                   "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}  # fmt: skip
DRIVERS = {**DEFAULT_DRIVERS, **{name: name for name in (*DEFAULT_DRIVERS.values(), "postgresql+psycopg2")}}
DISPLAY_NAMES = {"postgresql": "PostgreSQL", "mysql": "MySQL", "mariadb": "MariaDB"}

FAST, DURABLE, MARIADB = "fast", "durable", "mariadb"
PROFILE = re.compile(rf"({FAST}|{DURABLE}|{MARIADB})(?:\+(\d+(?:\.\d+)?)ms)?")
"""Servers of the run's own. With a delay, the workload reaches them over TCP, and each round trip takes longer."""


@dataclass(frozen=True, slots=True)
class DatabaseServer:
    """A server on which this run may create databases."""

    url: URL
    """An existing database of the server, to connect to for everything that is not the workload's."""
    label: str  # Product, version and where it comes from, for people
    pid: int | None = None  # The server's main process, if it runs on this machine where we can see it
    max_connections: int = 0  # The most it accepts
    through: URL | None = None  # How the workload reaches it, if that is another way

    @contextmanager
    def fresh_database(self, run: RunDirectory, suffix: str) -> Iterator[URL]:
        """Create a database, and drop it when the block ends.

        One per worker: a lock that a broken worker leaves behind cannot hold up the next one.
        """
        name = f"celery_alchemy_{run.id}_{suffix}"
        admin_url = self.url.render_as_string(hide_password=False)
        with run.guard.undoing(drop_database, admin_url, name, tolerated=(DBAPIError,)):
            try:
                _administer(self.url, f"CREATE DATABASE {name}")
            except DBAPIError as error:
                raise ServiceError(
                    f"DATABASE_URL: the user {self.url.username!r} cannot create the database {name}: {error.orig}"
                ) from error
            yield (self.through or self.url).set(database=name)


@contextmanager
def database_server(run: RunDirectory, database_url: str | None = None) -> Iterator[DatabaseServer]:
    """Yield the server behind `database_url`, or one of our own, which stops when the block ends.

    Args:
        database_url: A URL, or the name of a profile: "fast" (PostgreSQL on a Unix socket, fsync off; the default),
            "durable" (PostgreSQL with fsync), "mariadb"; with a delay like "durable+0.25ms".
    Raises:
        ServiceError: It cannot be reached or does not start.
    """
    profile = PROFILE.fullmatch(database_url or FAST)
    if profile is None:
        yield connect_server(parse_database_url(str(database_url)), "DATABASE_URL")
        return
    name, delay_ms = profile.groups()
    with ExitStack() as stack:
        own: Any = MariaDBServer(run) if name == MARIADB else PostgreSQLServer(run, durable=name == DURABLE)
        url, origin = stack.enter_context(own).url, "our own" if name == MARIADB else "embedded"
        durability = f"fsync {'off' if name == FAST else 'on'}"
        if delay_ms is None:
            yield connect_server(url, f"{origin}: Unix socket, {durability}")
        else:
            server = connect_server(url, f"{origin}: TCP with {delay_ms} ms added, {durability}")
            yield replace(server, through=stack.enter_context(distant(url, float(delay_ms) / 1000)))


def parse_database_url(text: str) -> URL:
    """Return the URL with its driver spelled out.

    Raises:
        ServiceError: SQLAlchemy cannot parse it, or it names a database without row locks or a driver not tried here.
    """
    try:
        url = make_url(text)
    except ArgumentError:
        raise ServiceError(
            "DATABASE_URL is not a database URL: it should look like postgresql://user:password@host/database. Names "
            "of servers that are started here: fast, durable and mariadb, also with a delay, like durable+0.25ms."
        ) from None
    if url.drivername not in DRIVERS:
        raise ServiceError(
            f"DATABASE_URL begins with {url.drivername!r}, which the load tests cannot use: they need "
            f"row locks and a list of connections. Known: {', '.join(DRIVERS)}."
        )
    return url.set(drivername=DRIVERS[url.drivername])


def connect_server(url: URL, origin: str) -> DatabaseServer:
    """Connect once, and tell what is there.

    Args:
        origin: "embedded" or "DATABASE_URL", for the label.
    Raises:
        ServiceError: It cannot be reached, or its driver is not installed.
    """
    try:
        with _connection(url) as connection:
            dialect, postgresql = connection.dialect, connection.dialect.name == "postgresql"
            product = "MariaDB" if getattr(dialect, "is_mariadb", False) else DISPLAY_NAMES[dialect.name]
            version = ".".join(str(part) for part in (dialect.server_version_info or ())[:3])
            setting = "SHOW max_connections" if postgresql else "SELECT @@max_connections"
            max_connections = int(connection.exec_driver_sql(setting).scalar_one())
            pid = _server_pid(connection) if postgresql else None
    except ImportError as error:
        raise ServiceError(f"{origin}: the driver for {url.drivername} is not installed: {error}") from error
    except DBAPIError as error:
        raise ServiceError(f"{origin}: cannot connect to {url.render_as_string()}: {error.orig}") from error
    return DatabaseServer(url, f"{product} {version} ({origin}, {dialect.driver})", pid, max_connections)


def _server_pid(connection: Connection) -> int | None:
    """Return the parent of our own server process, if it is on this machine."""
    with contextlib.suppress(psutil.Error):
        backend = psutil.Process(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
        # A process of the same number here, when the server is elsewhere, is another program.
        return backend.ppid() if backend.name().startswith("postgres") else None
    return None


def create_tables(url: URL, accounts: int) -> None:
    """Create the tables, and `accounts` accounts with ids from 1."""
    with _connection(url) as connection:
        Base.metadata.create_all(connection)
        connection.execute(insert(Account), [{"id": number} for number in range(1, accounts + 1)])


def drop_database(admin_url: str, name: str) -> None:
    """Drop a database together with the connections to it."""
    url = make_url(admin_url)
    force = " WITH (FORCE)" if url.get_backend_name() == "postgresql" else ""
    _administer(url, f"DROP DATABASE IF EXISTS {name}{force}")


def _administer(url: URL, statement: str) -> None:
    with _connection(url) as connection:
        connection.exec_driver_sql(statement)


@contextmanager
def _connection(url: URL) -> Iterator[Connection]:
    """Yield a connection that commits each statement, and is not kept."""
    with create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        yield connection
