"""No COMMIT is sent for another transaction than the one that SQLAlchemy has begun.

A server may have undone a transaction whose error was caught (a deadlock, a failed statement), and code may have ended
one on the driver's connection. What is executed after that belongs to a new transaction or to none: to commit it would
be to commit half of the work. The drivers know: the state of the transaction, and how often one has begun. So the look
stands before every COMMIT of an Engine, whoever asks for it.

COMMITs are counted too, for the thread or greenlet that sends them.
"""

from __future__ import annotations

from typing import Any, NoReturn

from sqlalchemy.engine import Connection, Engine

from ..drivers.base import Ended, driver_of
from ..scope import here
from .failed_transaction import refuse


def guard(engine: Engine) -> None:
    """Let no COMMIT of `engine` be one of half a transaction."""
    dialect: Any = engine.dialect
    driver = driver_of(dialect)
    driver.follow_transactions(engine)
    driver.follow_statements(dialect)
    driver.guard_commits(dialect, _refuse)
    begin, commit, roll_back = dialect.do_begin_twophase, dialect.do_commit_twophase, dialect.do_rollback_twophase
    began = driver.began

    def do_begin_twophase(connection: Connection, xid: Any) -> None:
        begin(connection, xid)
        began(connection.connection)

    def do_commit_twophase(connection: Connection, *args: Any, **kwargs: Any) -> None:
        commit(connection, *args, **kwargs)
        began(connection.connection)
        here().commits += 1

    def do_rollback_twophase(connection: Connection, *args: Any, **kwargs: Any) -> None:
        roll_back(connection, *args, **kwargs)
        began(connection.connection)

    dialect.do_begin_twophase, dialect.do_commit_twophase = do_begin_twophase, do_commit_twophase
    dialect.do_rollback_twophase = do_rollback_twophase


def _refuse(ended: Ended) -> NoReturn:
    refuse("The transaction", ended)
