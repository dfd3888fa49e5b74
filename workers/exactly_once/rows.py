"""The rows of completed tasks of an app, each looked at or written in a transaction of its own."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import Table
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from ...strategies.drivers.base import driver_of
from ...strategies.engines.elsewhere import unnoted
from ...strategies.features import completed
from ...strategies.features.completed import Claim, Key, Record
from ...strategies.features.completed_table import chosen_completed_table
from ...strategies.features.exactly_once import probe
from ...strategies.interrupts import is_interrupt
from ..apps import Served
from ..crossing import on_its_loop as crossed
from ..errors import as_configuration_error

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_INSTEAD = "Call it in a thread, for example `await asyncio.to_thread(db.forget, task_id)`."


def on_its_loop(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let `method` of Rows run where its Engine is: that of a driver for asyncio belongs to an event loop."""

    @functools.wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        rows: Any = args[0]
        return crossed(rows.side, functools.partial(method, *args, **kwargs), _INSTEAD)

    return call


class Rows:
    """The table of completed tasks of an app.

    `look`, `probe`, `complete` and `prune_some` are for tasks, which run where the Engine is; the others may be called
    from anywhere.

    Args:
        db: The Alchemy of the app's default database.
        side: What has the strategy whose Engine is used, where that is not `db`: for coroutines.
    """

    def __init__(self, db: Served, side: Any = None) -> None:
        self._db = db
        self.side: Any = side or db

    @functools.cached_property
    def table(self) -> Table:
        """The table, as the app's settings name it."""
        with as_configuration_error():
            return chosen_completed_table(self._db.settings.completed_table)

    @property
    def engine(self) -> Engine:
        """The Engine of this process."""
        engine: Engine = self.side.strategy.engine
        return engine

    def look(self, key: Key) -> Record | None:
        """Return what the row of `key` says; None where there is none. No transaction is left open.

        Raises:
            InvalidSetting: there is no table.
        """
        engine, table = self.engine, self.table
        try:
            if driver_of(engine.dialect).looks_alone(engine.dialect):
                return self._look_alone(engine, table, key)
            with self._connected(engine) as connection:
                return completed.look(connection, table, key)
        except DBAPIError as error:
            raise completed.explained(error, engine, table) from error

    def _look_alone(self, engine: Engine, table: Table, key: Key) -> Record | None:
        with unnoted(), closing(engine.raw_connection()) as connection:
            try:
                return completed.look_alone(connection, engine.dialect, table, key)
            except BaseException as error:
                if is_interrupt(error):
                    connection.invalidate()  # in the middle of an answer, maybe
                    raise
                dbapi: Any = engine.dialect.loaded_dbapi
                if not isinstance(error, dbapi.Error):
                    raise
                raised = DBAPIError.instance(None, None, error, dbapi.Error, dialect=engine.dialect)
                if engine.dialect.is_disconnect(error, connection.dbapi_connection, None):
                    connection.invalidate(error)
                raise raised from error

    @on_its_loop
    def run(self, work: Callable[[Connection, Table], Result]) -> Result:
        """Return what `work(connection, table)` does, in a transaction of its own that is committed.

        Raises:
            InvalidSetting: there is no table.
        """
        engine, table = self.engine, self.table
        try:
            with unnoted(), engine.begin() as connection:
                return work(connection, table)
        except DBAPIError as error:
            raise completed.explained(error, engine, table) from error

    @on_its_loop
    def explained(self, error: DBAPIError) -> Exception:
        """Return what to raise where the table could not be used: `error`, or one that says what to do."""
        return completed.explained(error, self.engine, self.table)

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

    @on_its_loop
    def forget(self, task_id: str) -> int:
        """Delete what is recorded of `task_id`; return how many rows there were.

        Raises:
            InvalidSetting: there is no table.
        """
        engine, table = self.engine, self.table
        try:
            with unnoted(), engine.begin() as connection:
                return completed.forget(connection, table, task_id)
        except DBAPIError as error:
            raise completed.explained(error, engine, table) from error

    @on_its_loop
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
        with self.engine.begin() as connection:
            return completed.prune(connection, self.table, older_than_s, most)

    @on_its_loop
    def listed(self, **choice: Any) -> list[completed.Listed]:
        """Return rows, the newest first; see `completed.listed`."""
        with self._connected(self.engine) as connection:
            return completed.listed(connection, self.table, **choice)

    def age_s(self, record: Record) -> float:
        """Return how long ago a row was written, in seconds, by this machine's clock."""
        return max(0.0, time.time() - record.completed_at)
