"""Two-phase commit over the databases of a unit of work: all of them commit, or none does.

Each transaction has a name on its server, `alchemy/DECIDER/SERVER/DATABASE/NUMBER`. DECIDER is the database that the
unit of work used first, SERVER a fingerprint of where that is. It is prepared first, committed first, and rolled back
last. So what a crash leaves prepared can be decided by anybody, without a log: while the decider's transaction is still
prepared, nothing of it was committed, and all are rolled back; once it is gone, the others are committed. `in_doubt`
does that.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.engine import URL, Connection, Dialect, Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from .._sqlalchemy import connections_of, is_prepared, root_of
from ..engines.transient import is_answer
from ..errors import CeleryAlchemyError
from ..options import DatabaseOptions
from ..registry import innermost_entry
from ..sessions import UnitSession
from .part import OneOfSeveral

PREFIX = "alchemy/"
_LONGEST_NAME = 16
"""Of a database in the name of a transaction, which may have 64 bytes on MySQL."""


class TwoPhaseUnavailable(CeleryAlchemyError):
    """A server refused to prepare a transaction, and says that it never does."""


class TwoPhaseSession(UnitSession):
    """Session whose transactions can be prepared."""

    def commit(self) -> None:
        # One database, and nothing prepared: two phases would cost a round trip, and agree with no other.
        if is_prepared(self) or len(connections_of(self)) > 1:
            super().commit()
            return
        self.twophase = False
        try:
            super().commit()
        finally:
            self.twophase = True


def can_prepare(dialect: type[Dialect]) -> bool:
    """Tell whether the databases of this dialect have two-phase commit."""
    return dialect.do_begin_twophase is not DefaultDialect.do_begin_twophase


def name_transactions(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: the two-phase transactions of units of work have names that tell how to decide them."""
    if not options.two_phase or options.reads:
        return
    database = options.database
    dialect, server = engine.dialect, fingerprint(engine.url)
    unnamed, prepare = dialect.create_xid, dialect.do_prepare_twophase

    def create_xid() -> Any:
        unit = _beginning_unit(database)
        return unnamed() if unit is None else _name_transaction(unit, database, server)

    def do_prepare_twophase(connection: Connection, xid: Any) -> None:
        try:
            prepare(connection, xid)
        except BaseException:
            # The server has refused it and rolled it back, or nobody knows (`prepared` minds that). psycopg takes it
            # for prepared, and its ROLLBACK PREPARED would fail with an error that hides this one.
            connection.invalidate()
            raise

    dialect.create_xid = create_xid  # type: ignore[method-assign]
    dialect.do_prepare_twophase = do_prepare_twophase  # type: ignore[method-assign]


def _name_transaction(unit: OneOfSeveral, database: str, server: str) -> str:
    """Return the name of the transaction that `unit` begins on `database`."""
    whole = unit.whole
    if whole.decision is None:
        whole.decision = f"{short(database)}/{server}", uuid.uuid4().hex[:12]
        whole.decider = unit
    decider, number = whole.decision
    return f"{PREFIX}{decider}/{short(database)}/{number}"


def fingerprint(url: URL) -> str:
    """Return what tells the server and database of `url` from others, for the names of transactions."""
    socket = url.query.get("host") or url.query.get("unix_socket")
    place = f"{url.get_backend_name()}/{url.host or socket}/{url.port}/{url.database}"
    return hashlib.sha256(place.encode()).hexdigest()[:6]


def short(database: str) -> str:
    """Return the name of a database as it stands in the name of a transaction."""
    if len(database) <= _LONGEST_NAME and "/" not in database:
        return database
    return f"{database[:7].replace('/', '_')}~{hashlib.sha256(database.encode()).hexdigest()[:8]}"


def _beginning_unit(database: str) -> OneOfSeveral | None:
    """Return the unit of work whose Session has just checked a connection of `database` out, and begins a transaction
    on it; None where other code begins one."""
    top = innermost_entry()
    for unit in top.unit.all_units if top is not None else ():
        if unit.database == database and unit.connected == 1:
            unit.connected = 2
            assert isinstance(unit, OneOfSeveral)
            return unit
    return None


def decider_first(units: list[OneOfSeveral]) -> list[OneOfSeveral]:
    """Return `units`, of one whole, with the one that decides for the others at the front."""
    decider = units[-1].decider
    return units if decider is None else [decider, *(unit for unit in units if unit is not decider)]


def prepared(units: list[OneOfSeveral]) -> list[OneOfSeveral]:
    """Prepare what is to commit together, and return `units` in the order they are to be committed in.

    The one database that has no two-phase commit commits when all others are prepared, and before they commit.

    Raises:
        TwoPhaseUnavailable: a server prepares no transactions at all.
    """
    decider = units[-1].decider
    if decider is None:
        return units
    taking_part = [unit for unit in units if _is_open(unit) and unit.commits and not unit.read_only]
    if len(taking_part) <= 1:
        return units
    if not _is_open(decider):
        decider.session.connection()  # its transaction was ended by hand since; the others' names say that it decides
        taking_part.append(decider)
    able = [unit for unit in decider_first(units) if unit in taking_part and unit.session.twophase]
    for unit in able:
        try:
            with _explaining(unit):
                transaction = root_of(unit.session)
                assert transaction is not None
                transaction.prepare()
        except BaseException as error:
            if unit is not decider and not is_answer(error):
                decider.stays_prepared = True  # this one may be prepared: while the decider is, it is rolled back
            raise
    others = [unit for unit in units if unit not in able]
    return [*others, *able]


def _is_open(unit: OneOfSeveral) -> bool:
    session: Session | None = unit.opened
    return session is not None and session.in_transaction()


@contextmanager
def _explaining(unit: OneOfSeveral) -> Iterator[None]:
    """Let what the server has said be raised, and no error of the clean-up after it."""
    try:
        yield
    except Exception as error:
        refused = _servers_error(error)
        if refused is None:
            raise
        if "max_prepared_transactions" in str(refused) or "prepared transactions are disabled" in str(refused):
            raise TwoPhaseUnavailable(
                f"{unit.label}: the server of the database {unit.database!r} prepares no transactions, so "
                f"alchemy_two_phase cannot work. Set max_prepared_transactions in postgresql.conf to at least the most "
                f"connections of all workers, and restart it; or leave alchemy_two_phase out."
            ) from refused
        if refused is error:
            raise
        raise refused from refused.__cause__


def _servers_error(error: BaseException) -> DBAPIError | None:
    """Return the first error of the database that led to `error`: SQLAlchemy 2.0 fails again when it rolls back."""
    found, seen = None, error
    while seen is not None:
        found = seen if isinstance(seen, DBAPIError) else found
        seen = seen.__context__  # type: ignore[assignment]
    return found
