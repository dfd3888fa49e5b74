"""The rows of completed tasks of an app, each looked at or written in a transaction of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from sqlalchemy import Table
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from ...strategies.engines.elsewhere import unnoted
from ...strategies.features import completed
from ...strategies.features.completed import Claim, Key, Record
from ...strategies.features.completed_table import chosen_completed_table
from ...strategies.features.exactly_once import probe
from ..apps import Served
from ..errors import as_configuration_error

_PSYCOPGS = frozenset({"psycopg", "psycopg2"})


class Rows:
    """The table of completed tasks of an app.

    Args:
        db: The Alchemy of the app's default database.
    """

    def __init__(self, db: Served) -> None:
        self._db = db

    @property
    def table(self) -> Table:
        """The table, as the app's settings name it."""
        with as_configuration_error():
            return chosen_completed_table(self._db.settings.completed_table)

    @property
    def engine(self) -> Engine:
        """The Engine of this process."""
        engine: Engine = self._db.strategy.engine
        return engine

    def look(self, key: Key) -> Record | None:
        """Return what the row of `key` says; None where there is none. No transaction is left open.

        Raises:
            InvalidSetting: there is no table.
        """
        engine, table = self.engine, self.table
        try:
            if engine.dialect.driver in _PSYCOPGS and not engine.dialect.is_async:
                return self._look_alone(engine, table, key)
            with self._connected(engine) as connection:
                return completed.look(connection, table, key)
        except DBAPIError as error:
            raise completed.explained(error, engine, table) from error

    def _look_alone(self, engine: Engine, table: Table, key: Key) -> Record | None:
        with unnoted(), closing(engine.raw_connection()) as connection:
            try:
                return completed.look_alone(connection, engine.dialect, table, key)
            except Exception as error:
                dbapi: Any = engine.dialect.loaded_dbapi
                if not isinstance(error, dbapi.Error):
                    raise
                raised = DBAPIError.instance(None, None, error, dbapi.Error, dialect=engine.dialect)
                if engine.dialect.is_disconnect(error, connection.dbapi_connection, None):
                    connection.invalidate(error)
                raise raised from error

    @contextmanager
    def _connected(self, engine: Engine) -> Iterator[Connection]:
        with unnoted(), engine.connect() as connection:
            yield connection

    def probe(self, key: Key, task: str) -> Claim | None:
        """Tell whether another transaction has the row of `key` in hand, or it is there; None: neither."""
        with unnoted():
            return probe(self.engine, self.table, key, task)

    def complete(self, key: Key, record: Record) -> None:
        """Let the row of `key` say `record`."""
        with unnoted(), self.engine.begin() as connection:
            completed.complete(connection, self.table, key, record)

    def forget(self, task_id: str) -> int:
        """Delete what is recorded of `task_id`; return how many rows there were."""
        with self.engine.begin() as connection:
            return completed.forget(connection, self.table, task_id)

    def prune(self, older_than_s: float) -> int:
        """Delete all rows that are older, a thousand in each transaction; return how many there were."""
        total = 0
        while True:
            with self.engine.begin() as connection:
                found = completed.prune(connection, self.table, older_than_s)
            total += found
            if not found:
                return total

    def prune_some(self, older_than_s: float, most: int) -> int:
        """Delete up to so many rows that are older; return how many there were."""
        with unnoted(), self.engine.begin() as connection:
            return completed.prune(connection, self.table, older_than_s, most)

    def listed(self, **choice: Any) -> list[completed.Listed]:
        """Return rows, the newest first; see `completed.listed`."""
        with self._connected(self.engine) as connection:
            return completed.listed(connection, self.table, **choice)

    def age_s(self, record: Record) -> float:
        """Return how long ago a row was written, in seconds, by this machine's clock."""
        return max(0.0, time.time() - record.completed_at)
