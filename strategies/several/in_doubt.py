"""What a crash has left prepared: transactions that wait for somebody to commit them or to roll them back.

Each may be ended at any time, by several processes at once, while its worker still goes on: what is done is what the
server of the decider says, and that does not change any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from ..drivers.base import code_of
from ..errors import NotEnded
from .names import PREFIX, Name, parse, short
from .servers import Server, can_prepare, server_of

_XA_RBROLLBACK = 1402


class InDoubt(NamedTuple):
    """A transaction of this app that is prepared, and what is to become of it."""

    database: str
    name: str
    commits: bool | None
    """True: it is decided that all are committed; False: none is; None: that is not decided, or not known."""
    decides: bool
    """Its database is the one that decides."""
    why: str
    """The reason, for people."""


class Foreign(NamedTuple):
    """A prepared transaction that has a name of ours, and is not of this app on these servers."""

    database: str
    """The one that it was found by."""
    name: str
    why: str
    may_be_ours: bool
    """It is of an older version, and does not tell."""


class Findings(NamedTuple):
    """What is prepared on the servers of an app."""

    ours: list[InDoubt]
    """In the order in which they are to be resolved."""
    foreign: list[Foreign]


class _Look:
    """What one database of an app says."""

    def __init__(self, database: str, engine: Engine) -> None:
        self.database, self.engine, self.server = database, engine, server_of(engine.dialect)
        with _connect(engine) as connection:
            self.fingerprint = self.server.fingerprint(connection, database)
            found = self.server.prepared(connection)
        self.prepared = {name: token for name, token in found.items() if name.startswith(PREFIX)}


def find(engines: Mapping[str, Engine]) -> list[InDoubt]:
    """Return the prepared transactions of an app, in the order in which they are to be resolved.

    Those of a unit of work that is just committing are among them: only what is still here some time later is in doubt.

    Args:
        engines: An Engine for each database of the app.
    """
    return look(engines).ours


def look(engines: Mapping[str, Engine]) -> Findings:
    """Return what is prepared on the servers of an app, its own transactions and those of others.

    Args:
        engines: An Engine for each database of the app, those that cannot prepare among them.
    Raises:
        sqlalchemy.exc.DBAPIError: a server does not let this user look, or cannot be reached.
        TwoPhaseUnavailable: one does not tell who it is.
    """
    looks = {name: _Look(name, engine) for name, engine in engines.items() if can_prepare(engine.dialect)}
    names = {short(name): name for name in looks}
    found = Findings([], [])
    seen: set[str] = set()
    for database, one in looks.items():
        for text in one.prepared:
            name = parse(text)
            owner = names.get(name.database) if name is not None else None
            if name is not None and owner is not None and owner != database and text in looks[owner].prepared:
                continue  # MySQL lists what is prepared in all schemas of a server
            decider = _decider_of(name, looks, one, len(engines)) if name is not None and owner == database else None
            if name is None or decider is None:
                if text not in seen:
                    found.foreign.append(Foreign(database, text, _why_foreign(name), name is None))
                seen.add(text)
                continue
            found.ours.append(_in_doubt(text, name, one, decider, _unable(engines)))
    found.ours.sort(key=lambda one: _order(one, looks[one.database].server))
    return found


def resolve(engines: Mapping[str, Engine], one: InDoubt) -> bool:
    """Commit it or roll it back, as has been decided by now; or leave it where that is not possible yet.

    Returns:
        Whether it is ended, by this call or by another process.
    Raises:
        NotEnded: the server does not let this user.
    """
    name = parse(one.name)
    assert name is not None
    engine = engines[one.database]
    server = server_of(engine.dialect)
    commits = one.commits
    if name.decider is not None:
        commits = _decided(engines, name)
    elif commits and any(name.token == token for token in _tokens_of_others(engines, name)):
        return False  # the others are to be ended first: what the decider says is gone with it
    if commits is None:
        return False
    with _connect(engine) as connection:
        try:
            if commits:
                connection.commit_prepared(one.name, recover=True)
            else:
                connection.rollback_prepared(one.name, recover=True)
        except Exception as error:
            # Of some drivers SQLAlchemy gives the error as it is.
            original = error.orig if isinstance(error, DBAPIError) else error
            code = code_of(original) if original is not None else None
            if code is None:
                raise
            # MariaDB prepares a transaction that only read, and lists it, but has nothing left to end.
            if code != _XA_RBROLLBACK and code not in server.gone:
                raise NotEnded(str(original)) from error
    with _connect(engine) as connection:
        return one.name not in server.prepared(connection)


def _decider_of(name: Name, looks: Mapping[str, _Look], here: _Look, databases: int) -> _Look | None:
    """Return the database that decides; None where it is none of this app."""
    if name.decider is None:
        return here if here.server.is_led_by(name, here.engine, databases) else None
    return next((one for one in looks.values() if one.fingerprint == name.decider), None)


def _why_foreign(name: Name | None) -> str:
    if name is None:
        return (
            "its name is of another version of celery-alchemy, which alone could tell what was decided. Workers that "
            "still run may end it; if none does, end it by hand"
        )
    return "another deployment has prepared it: it is decided by a database that is none of this app's"


def _in_doubt(text: str, name: Name, here: _Look, decider: _Look, unable: list[str]) -> InDoubt:
    decides = name.decider is None
    if decides and unable:
        why = (
            f"{' and '.join(map(repr, unable))} cannot prepare, and may have committed or not: look there, and end "
            f"this one by hand"
        )
        return InDoubt(here.database, text, None, decides, why)
    if decides:
        commits: bool | None = not here.server.prepares_first
    else:
        commits = _has_committed(decider.engine, decider.database, name.token)
        if commits and unable and not decider.server.prepares_first:
            return InDoubt(here.database, text, None, decides, f"it ends as that of {decider.database!r} does")
        if commits is None and decider.server.prepares_first and not unable and name.token in decider.prepared.values():
            commits = False  # the decider is rolled back before it
    return InDoubt(here.database, text, commits, decides, _WHY[commits])


_WHY = {
    True: "to be committed: the database that decides has committed",
    False: "to be rolled back: nothing of it is committed",
    None: "left alone: its unit of work still goes on, with a connection to the database that decides",
}


def _decided(engines: Mapping[str, Engine], name: Name) -> bool | None:
    unable = _unable(engines)
    for database, engine in engines.items():
        if not can_prepare(engine.dialect):
            continue
        server = server_of(engine.dialect)
        with _connect(engine) as connection:
            if server.fingerprint(connection, database) != name.decider:
                continue
            committed = server.has_committed(connection, short(database), name.token)
        return None if committed and unable and not server.prepares_first else committed
    return None


def _has_committed(engine: Engine, database: str, token: str) -> bool | None:
    with _connect(engine) as connection:
        return server_of(engine.dialect).has_committed(connection, short(database), token)


def _tokens_of_others(engines: Mapping[str, Engine], name: Name) -> list[str]:
    found = []
    for engine in engines.values():
        if can_prepare(engine.dialect):
            with _connect(engine) as connection:
                names = [parse(text) for text in server_of(engine.dialect).prepared(connection)]
            found += [other.token for other in names if other is not None and other.decider is not None]
    return found


def _unable(engines: Mapping[str, Engine]) -> list[str]:
    """Return the databases that commit between the two phases: their COMMIT decides, and leaves no trace."""
    return [name for name, engine in engines.items() if not can_prepare(engine.dialect)]


def _order(one: InDoubt, server: Server) -> int:
    if not one.decides:
        return 1
    return 0 if server.prepares_first else 2


def _connect(engine: Engine) -> Connection:
    # Outside any transaction, or MySQL refuses.
    return engine.connect().execution_options(isolation_level="AUTOCOMMIT")
