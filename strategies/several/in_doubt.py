"""What a crash has left prepared: transactions that wait for somebody to commit them or to roll them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from .two_phase import PREFIX, can_prepare, fingerprint, short

_XA_RBROLLBACK = 1402


class InDoubt(NamedTuple):
    """A transaction that is prepared, and what is to become of it."""

    database: str
    name: str
    commits: bool
    """True: the database that decides has committed; False: it has not, and neither may this one."""
    decides: bool
    """Its database is the one that decides; it is rolled back after the others."""


def find(engines: Mapping[str, Engine]) -> list[InDoubt]:
    """Return the prepared transactions of an app, in the order in which they are to be resolved.

    Those of a unit of work that is just committing are among them: only what is still here some time later is in doubt.

    Args:
        engines: An Engine for each database of the app.
    """
    able = {name: engine for name, engine in engines.items() if can_prepare(type(engine.dialect))}
    names = {short(name): name for name in able}
    # The decider is prepared before the others, and committed before them: it is to be looked at after them.
    seen = [(database, name) for database, engine in able.items() for name in _prepared(engine)]
    again = {database: set(_prepared(engine)) for database, engine in able.items()}
    found = []
    for database, name in seen:
        parts = name.removeprefix(PREFIX).split("/")
        if len(parts) != 4 or names.get(parts[2]) != database:
            continue  # of another database on the same server
        decider = names.get(parts[0])
        if decider is None or fingerprint(able[decider].url) != parts[1]:
            continue  # of another app: its decider is none of ours
        undecided = f"{PREFIX}{parts[0]}/{parts[1]}/{parts[0]}/{parts[3]}" in again[decider]
        found.append(InDoubt(database, name, not undecided, decider == database))
    return sorted(found, key=lambda one: one.decides)


def resolve(engines: Mapping[str, Engine], one: InDoubt) -> None:
    """Commit it or roll it back.

    Raises:
        sqlalchemy.exc.DBAPIError: the server does not let this user, or somebody else was faster.
    """
    with _connect(engines[one.database]) as connection:
        if one.commits:
            connection.commit_prepared(one.name, recover=True)
            return
        try:
            connection.rollback_prepared(one.name, recover=True)
        except DBAPIError as error:
            # MariaDB prepares a transaction that only read, and lists it, but has nothing left to roll back.
            if not (error.orig is not None and error.orig.args[:1] == (_XA_RBROLLBACK,)):
                raise


def _connect(engine: Engine) -> Connection:
    # Outside any transaction, or MySQL refuses.
    return engine.connect().execution_options(isolation_level="AUTOCOMMIT")


def _prepared(engine: Engine) -> list[str]:
    with _connect(engine) as connection:
        names = _prepared_on_postgresql(connection) if engine.dialect.name == "postgresql" else _recovered(connection)
    return [name for name in names if name.startswith(PREFIX)]


def _prepared_on_postgresql(connection: Connection) -> list[str]:
    # The list is of the whole cluster, but each can only be resolved in its own database.
    return list(connection.scalars(text("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")))


def _recovered(connection: Connection) -> list[str]:
    found: list[Any] = connection.recover_twophase()
    return [name.decode() if isinstance(name, bytes) else str(name) for name in found]
