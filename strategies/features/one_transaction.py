"""For tests: everything happens on one connection, in one transaction that is rolled back at the end.

Every Session joins that transaction with a savepoint of its own (`join_transaction_mode="create_savepoint"`): what a
task commits, others see, and nobody does when the test is over.
"""

from __future__ import annotations

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from ..base import SessionStrategy
from ..hooks import OpenUnit


class OneTransactionStrategy(SessionStrategy):
    """A Session per unit of work, all of them on one connection that the test holds.

    **Made for** tests, where one thing happens at a time, in whatever thread.

    Args:
        real: The strategy that would be in force.
        connection: A connection whose transaction has begun; whoever opened it rolls it back.
    """

    name = "one_transaction"
    engine_lives = "as long as that of the strategy it stands for"
    keyed_on = "the task request"
    released = "at the request's end"
    shares_connection = True

    def __init__(self, real: SessionStrategy, connection: Connection) -> None:
        super().__init__(real.engines, real.sessions, real.worker_pool, "a test rolls everything back")
        self._engine = real.engine
        self._probe = real._probe
        self._connection = connection
        self.follows_units = False

    def make_engine(self) -> Engine:
        raise NotImplementedError  # there is one

    def open(self, unit: OpenUnit) -> Session:
        session = self.sessions.new(bind=self._connection, join_transaction_mode="create_savepoint")
        session.twophase = False
        return session

    def dispose(self) -> None:
        """Nothing to close: the connection is the test's."""

    def take_back(self) -> int:
        return 0
