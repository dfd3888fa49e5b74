"""Keeping tasks in the middle of a statement until a test has done what it wants to do meanwhile.

The statement waits for the lock of a row. One that sleeps for a time may be over, on a busy machine, before the test
has seen it.
"""

import contextlib
from collections.abc import Callable, Iterator

from sqlalchemy import NullPool, create_engine, select
from sqlalchemy.exc import DBAPIError

from support.databases import Database
from support.project.models import Counter


@contextlib.contextmanager
def shut(database: Database, gate: str) -> Iterator[Callable[[], None]]:
    """Keep all who come to the gate waiting until the end of the block, or until what is yielded is called."""
    database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=gate)
    engine = create_engine(database.engine.url, poolclass=NullPool)
    connection = engine.connect()
    connection.execute(select(Counter.value).where(Counter.key == gate).with_for_update())

    def open_it() -> None:
        with contextlib.suppress(DBAPIError):  # the server may have gone meanwhile, and the lock with it
            connection.rollback()

    try:
        yield open_it
    finally:
        open_it()
        connection.close()


def waiting(database: Database, worker: str) -> list[int]:
    """Return the numbers of the worker's connections whose statement waits at a gate."""
    return [
        one.pid
        for one in database.busy(worker)
        if one.state in {"active", "Query"} and ("FOR SHARE" in one.query or "IN SHARE MODE" in one.query)
    ]
