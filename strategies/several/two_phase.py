"""Two-phase commit over the databases of a unit of work: all of them commit, or none does.

One of them decides: the one that the unit of work used first. All prepare before any commits, and the name of each
transaction says who decides (`names`). What a crash leaves prepared can so be decided by anybody, at any time, without
a log and in whichever order (`in_doubt`), while the worker may still be alive. What was decided can be asked of the
server of the decider (`servers`):

PostgreSQL: prepare the decider, prepare the others, commit the decider, commit the others. The server says of its
transaction id, which the others have in their names, whether it was committed. Until then anybody may roll it back.

MySQL, MariaDB: prepare the others, prepare the decider, commit the others, commit the decider. All is decided when it
is prepared; until then only its own connection can do that, and when that is closed it never will be.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from .._sqlalchemy import connections_of, is_prepared, root_of
from .._sqlalchemy_pools import creator_of
from ..drivers.base import code_of
from ..engines.transient import is_answer
from ..errors import CeleryAlchemyError, TransientDatabaseError
from ..options import DatabaseOptions
from ..registry import open_entries
from ..sessions import UnitSession
from .names import Name, short
from .part import Claim, OneOfSeveral
from .servers import TwoPhaseUnavailable, can_prepare, server_of

__all__ = ["CannotAgree", "RolledBackElsewhere", "TwoPhaseSession", "TwoPhaseUnavailable", "can_prepare"]

logger: logging.Logger = logging.getLogger(__name__)


class CannotAgree(CeleryAlchemyError):
    """The transactions of a unit of work can neither be committed together, nor is it known that they need not."""


class RolledBackElsewhere(TransientDatabaseError):
    """`celery alchemy in-doubt --resolve` has rolled a unit of work back before it was committed."""


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
            self.twophase: bool = True


def name_transactions(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: the two-phase transactions of units of work have names that tell how to decide them."""
    if not options.two_phase or options.reads:
        return
    dialect = engine.dialect
    server = server_of(dialect)
    server.listen(engine)
    unnamed, prepare = dialect.create_xid, dialect.do_prepare_twophase
    commit, roll_back = dialect.do_commit_twophase, dialect.do_rollback_twophase

    def create_xid() -> Any:
        unit = _beginning_unit(options.database)
        return unnamed() if unit is None else str(_claim(unit, engine, options).xid)

    def do_prepare_twophase(connection: Connection, xid: Any) -> None:
        claim = _claim_named(xid)
        try:
            if claim is None or claim.xid == claim.name:
                prepare(connection, xid)
            else:
                server.prepare_as(connection, str(claim.xid))
        except BaseException:
            # The server has refused it and rolled it back, or nobody knows (`prepared` minds that). psycopg takes it
            # for prepared, and its ROLLBACK PREPARED would fail with an error that hides this one.
            connection.invalidate()
            raise

    def do_commit_twophase(connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False) -> None:
        claim = _claim_named(xid) if is_prepared and not recover else None
        if claim is None:
            commit(connection, xid, is_prepared, recover)
            return
        try:
            commit(connection, str(claim.xid), True, claim.xid != claim.name)
        except Exception as error:
            if not _is_gone(error, server.gone):
                raise
            connection.invalidate()  # psycopg takes it for prepared still
            _learn_end(claim, engine)

    def do_rollback_twophase(connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False) -> None:
        claim = _claim_named(xid) if is_prepared and not recover else None
        if claim is None:
            roll_back(connection, xid, is_prepared, recover)
            return
        try:
            roll_back(connection, str(claim.xid), True, claim.xid != claim.name)
        except Exception as error:
            if not _is_gone(error, server.gone):
                raise
            connection.invalidate()  # rolled back by `in_doubt`, which was faster

    dialect.create_xid = create_xid  # type: ignore[method-assign]
    dialect.do_prepare_twophase = do_prepare_twophase  # type: ignore[method-assign]
    dialect.do_commit_twophase = do_commit_twophase  # type: ignore[method-assign]
    dialect.do_rollback_twophase = do_rollback_twophase  # type: ignore[method-assign]


# -- names ---------------------------------------------------------------------------------------------------------


def _claim(unit: OneOfSeveral, engine: Engine, options: DatabaseOptions) -> Claim:
    """Name the transaction that `unit` begins now on `engine`, after the first that goes on and can be asked."""
    open_claims = [claim for claim in _claims(unit) if claim.unit is not unit and claim.is_open()]
    server, transaction = server_of(engine.dialect), root_of(unit.session)
    former = unit.claim
    if former is not None and any(claim.decider is former for claim in open_claims) and not server.prepares_first:
        # It was ended by hand. The others have its token in their names, and it decides for them under the same name.
        former.transaction = transaction
        return former
    decider = next((claim for claim in open_claims if claim.decider is None and claim.can_be_asked()), None)
    if decider is None:
        name = Name(short(options.database), None, server.new_token(engine, options.databases))
    else:
        name = _name_after(decider, options.database)
    unit.claim = claim = Claim(unit, server, transaction, name, decider, name)
    return claim


def _name_after(decider: Claim, database: str) -> Name:
    """Return the name of a transaction on `database` that `decider` decides."""
    connection = decider.connection
    if decider.token is None:
        decider.token = decider.server.token_of(connection, decider.name)
    return Name(short(database), decider.server.fingerprint(connection, decider.unit.database), decider.token)


def _units(unit: OneOfSeveral) -> list[OneOfSeveral]:
    return [one for one in unit.whole.all_units if isinstance(one, OneOfSeveral)]


def _claims(unit: OneOfSeveral) -> list[Claim]:
    return [one.claim for one in _units(unit) if one.claim is not None]


def _beginning_unit(database: str) -> OneOfSeveral | None:
    """Return the unit of work whose Session has just checked a connection of `database` out, and begins a transaction
    on it; None where other code begins one. It may be an outer one, used inside another."""
    for entry in reversed(open_entries()):
        for unit in entry.unit.all_units:
            session = unit.opened
            if unit.database == database and unit.connected == 1 and session is not None and session.twophase:
                unit.connected = 2
                assert isinstance(unit, OneOfSeveral)
                return unit
    return None


def _claim_named(xid: Any) -> Claim | None:
    """Return the claim of the transaction that began as `xid`; None where it is of no unit of work."""
    for entry in reversed(open_entries()):
        for unit in entry.unit.all_units:
            if isinstance(unit, OneOfSeveral) and unit.claim is not None and str(unit.claim.name) == xid:
                return unit.claim
    return None


# -- both phases ---------------------------------------------------------------------------------------------------


def prepared(units: list[OneOfSeveral]) -> list[OneOfSeveral]:
    """Prepare what is to commit together, and return `units` in the order they are to be committed in.

    The one database that has no two-phase commit commits when all others are prepared, and before they commit.

    Raises:
        TwoPhaseUnavailable: a server prepares no transactions at all.
        CannotAgree: transactions were ended by hand, and those that go on cannot be decided together.
    """
    taking_part = [unit for unit in units if _is_open(unit) and unit.commits and not unit.read_only]
    if len(taking_part) <= 1:
        return units
    able = [_claim_of(unit) for unit in taking_part if unit.session.twophase]
    if not able:
        return units
    try:
        decider = _agree(able)
    except CannotAgree:
        written = [claim for claim in able if claim.server.has_written(claim.connection)]
        if len(written) + len(taking_part) - len(able) > 1:
            raise
        return units  # what has only read agrees with whatever the others do
    others = [claim for claim in able if claim is not decider]
    first = decider.server.prepares_first
    decides = not first and len(taking_part) == len(able)
    for claim in [decider, *others] if first else [*others, decider]:
        if decides and claim is decider:
            for other in others:
                other.unit.stays_prepared = True  # from here on they may have to be committed
        try:
            _prepare(claim)
        except BaseException as error:
            if claim is decider and is_answer(error):
                for other in others:
                    other.unit.stays_prepared = False
            elif not is_answer(error):
                claim.unit.stays_prepared = True  # it may be prepared: only the server of the decider tells
            raise
    ended = [claim.unit for claim in ([decider, *others] if first else [*others, decider])]
    return [*(unit for unit in units if unit not in ended), *ended]


def _claim_of(unit: OneOfSeveral) -> Claim:
    claim = unit.claim
    if claim is None or not claim.is_open():
        raise CannotAgree(
            f"{unit.label}: its transaction was begun by other code, so it has no name that says who decides, and "
            f"cannot be committed with those of other databases. Let `self.db` and `db.session` begin it."
        )
    return claim


def _agree(able: list[Claim]) -> Claim:
    """Return the one of `able` that decides, all others named after it, and `able` with it in it."""
    # MySQL has named its transactions when they began, and those names stay.
    fixed = {claim.decider or claim for claim in able if not claim.server.prepares_first}
    decider = next(iter(fixed), None) or next((claim for claim in able if claim.decider is None), able[0])
    if not decider.is_open() and not decider.server.prepares_first:
        decider.unit.session.connection()  # ended by hand since; it begins again under its name
    if len(fixed) > 1 or not decider.is_open():
        names = ", ".join(repr(claim.unit.database) for claim in able)
        raise CannotAgree(
            f"{decider.unit.whole.label}: the databases {names} cannot be committed together. The transaction of one "
            f"of them was committed or rolled back by hand while the others' went on. End all of them by hand, or "
            f"none; or let a unit_of_work() of its own do what is to end apart."
        )
    if decider not in able:
        able.append(decider)
    # What has lost its decider gets another, where the server takes a new name with PREPARE.
    if decider.decider is not None:
        token = decider.server.new_token(decider.connection.engine, 0)
        decider.decider, decider.xid = None, Name(short(decider.unit.database), None, token)
    for claim in able:
        if claim is not decider and claim.decider is not decider:
            claim.decider, claim.xid = decider, _name_after(decider, claim.unit.database)
    return decider


def _is_open(unit: OneOfSeveral) -> bool:
    session: Session | None = unit.opened
    return session is not None and session.in_transaction()


def _prepare(claim: Claim) -> None:
    transaction = root_of(claim.unit.session)
    assert transaction is not None
    with _explaining(claim.unit):
        transaction.prepare()


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


def _is_gone(error: Exception, codes: frozenset[str | int]) -> bool:
    original = error.orig if isinstance(error, DBAPIError) else error
    return original is not None and code_of(original) in codes


def _learn_end(claim: Claim, engine: Engine) -> None:
    """Find out how a prepared transaction was ended that was to be committed, and that somebody else has ended.

    Raises:
        RolledBackElsewhere: it was rolled back. Only that of the decider can be: all others are committed by now.
    """
    if claim.decider is not None or claim.token is None or not claim.server.prepares_first:
        logger.info("%s: its transaction %s was committed by another process", claim.unit.label, claim.xid)
        return
    # Not from the connection pool, where this unit of work has its connection already.
    asking = create_engine(engine.url, creator=creator_of(engine.pool), poolclass=NullPool)
    with asking.connect() as connection:
        committed = claim.server.has_committed(connection, claim.name.database, claim.token)
    if committed is not True:
        claim.unit.stays_prepared = False
        raise RolledBackElsewhere(
            f"{claim.unit.label}: between the two phases of its COMMIT it was rolled back, on all databases, by "
            f"`celery alchemy in-doubt --resolve`, which took it for one that nobody ends any more. Nothing of it is "
            f"there; it may run again."
        )
