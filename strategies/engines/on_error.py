"""What an Engine does when a statement fails: tell the unit of work, narrow the class, end what was interrupted."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, ExceptionContext

from .._sqlalchemy import creator_of
from ..drivers.base import driver_of
from ..interrupts import is_interrupt, is_kill
from .abandon import abandon
from .transient import narrow

#: Called with a database error, its connection, and whether the server has rolled the transaction back because of it.
ErrorObserver = Callable[[BaseException, Connection | None, bool], None]


def listen(engine: Engine, observe: ErrorObserver) -> None:
    """Let `observe` know of every error of `engine`, and let no interruption leave a connection in an unknown state."""
    driver = driver_of(engine.dialect)

    def on_error(context: ExceptionContext) -> BaseException | None:
        error = context.original_exception
        if not is_interrupt(error):
            narrow(context.sqlalchemy_exception, disconnected=context.is_disconnect)
            observe(context.sqlalchemy_exception or error, context.connection, driver.rolled_back(error))
            return None
        observe(context.sqlalchemy_exception or error, context.connection, False)
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
