"""What an Engine does when a statement fails: tell the unit of work, narrow the class, end what was interrupted."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, ExceptionContext, RootTransaction

from .._sqlalchemy_pools import creator_of
from ..drivers.base import Driver, driver_of
from ..drivers.stale import is_stale
from ..errors import BrokenTransaction
from ..interrupts import is_interrupt, is_kill
from ..options import DatabaseOptions
from .abandon import abandon
from .pool import recycle_all
from .transient import driver_passes, narrow

logger: logging.Logger = logging.getLogger(__name__)

#: Called with a database error and its connection.
ErrorObserver = Callable[[BaseException, Connection | None], None]
_IN_FAILED_SQL_TRANSACTION = "25P02"
#: Key in `Connection.info`: the transaction on it that was begun read-only because a unit of work asked for that.
_READ_ONLY = "celery_alchemy.read_only"


def listen(engine: Engine, observe: ErrorObserver, options: DatabaseOptions) -> None:
    """Let `observe` know of every error of `engine`, and let no interruption leave a connection in an unknown state."""
    driver = driver_of(engine.dialect)
    #: Transactions in which a statement has failed, and whether that passes.
    failed: weakref.WeakKeyDictionary[RootTransaction, bool] = weakref.WeakKeyDictionary()

    def on_error(context: ExceptionContext) -> BaseException | None:
        error = context.original_exception
        if isinstance(error, BrokenTransaction):
            return None  # our own, in place of a COMMIT
        if not is_interrupt(error):
            transaction = context.connection.get_transaction() if context.connection is not None else None
            if (
                transaction is not None
                and transaction in failed
                and driver.code_of(error) == _IN_FAILED_SQL_TRANSACTION
            ):
                narrow(context.sqlalchemy_exception, passes=failed[transaction])
                return None  # what the unit of work has to know is why it had failed
            if is_stale(error, context.statement):
                _throw_away(context.connection, driver)
            passes = driver_passes(error, context.statement, disconnected=context.is_disconnect)
            if not passes and _became_read_only(context, driver, options):
                said = str(error).strip()
                logger.warning("The database takes no writes at present (%s); all connections are made anew", said)
                recycle_all(engine.pool)
                passes = True
            if transaction is not None:
                failed[transaction] = passes
            narrow(context.sqlalchemy_exception, passes=passes)
            observe(context.sqlalchemy_exception or error, context.connection)
            return None
        observe(context.sqlalchemy_exception or error, context.connection)
        # The protocol is in the middle of an answer: SQLAlchemy must not send a ROLLBACK that the driver refuses with
        # an error of its own, which would hide this one and leave the slot checked out.
        connection = context.connection
        if connection is not None and is_kill(error):
            abandon(connection)
        elif connection is not None and not connection.closed and not connection.invalidated:
            driver.cancel_within_timeout(connection.connection.dbapi_connection, creator_of(engine.pool))
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
        if context.sqlalchemy_exception is None:
            return None
        # It struck while the statement was put together, and SQLAlchemy would wrap it in a StatementError. A second
        # one, for SQLAlchemy raises what is returned here from the first.
        return type(error)(*error.args)

    event.listen(engine, "handle_error", on_error)


def expect_read_only(connection: Connection) -> None:
    """Take it for a mistake of the task if it writes in the transaction that has just begun on `connection`."""
    transaction = connection.get_transaction()
    assert transaction is not None
    connection.info[_READ_ONLY] = weakref.ref(transaction)


def _became_read_only(context: ExceptionContext, driver: Driver, options: DatabaseOptions) -> bool:
    """Tell whether the server takes no writes, and no transaction without them was asked for."""
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated or options.reads:
        return False
    asked = connection.info.get(_READ_ONLY)
    if asked is not None and asked() is connection.get_transaction():
        return False
    if connection.get_execution_options().get("postgresql_readonly"):
        return False
    found, error = connection.connection.dbapi_connection, context.original_exception
    try:
        return found is not None and driver.became_read_only(error, found, behind_pooler=options.external_pooler)
    except Exception as failure:
        if is_interrupt(failure):
            raise
        # The statement's own error is what the task must see.
        logger.info("Could not find out why the server takes no writes: %s", failure)
        return False


def _throw_away(connection: Connection | None, driver: Driver) -> None:
    """Let no other task have `connection`, on which something prepared does not fit any more. It stays open until its
    transaction is over: a savepoint may still be rolled back."""
    if connection is None or connection.closed or connection.invalidated:
        return
    fairy = connection.connection
    logger.info("What was prepared on a connection does not fit the database any more: it is replaced by a new one")
    driver.stop_preparing(fairy.dbapi_connection)
    fairy.invalidate(soft=True)
