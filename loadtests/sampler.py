"""What the database server says of the workload's connections."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

QUERIES = {
    "postgresql": """
        SELECT count(*), count(*) FILTER (WHERE state LIKE 'idle in transaction%')
        FROM pg_stat_activity WHERE datname = :database AND backend_type = 'client backend'
    """,
    "mysql": """
        SELECT count(*), coalesce(sum(p.command = 'Sleep' AND t.trx_id IS NOT NULL), 0)
        FROM information_schema.processlist p
        LEFT JOIN information_schema.innodb_trx t ON t.trx_mysql_thread_id = p.id
        WHERE p.db = :database
    """,
}
QUERIES["mariadb"] = QUERIES["mysql"]


@dataclass(frozen=True, slots=True)
class Connections:
    """The connections to one database at one moment."""

    total: int
    idle_in_transaction: int


class Observer:
    """Counts connections to a database over a connection to another one, so that it never counts itself."""

    def __init__(self, server_url: URL, database: str) -> None:
        self._engine = create_engine(server_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._connection = self._engine.connect()
        self._query = text(QUERIES[self._engine.dialect.name])
        self._database = database

    def snapshot(self) -> Connections:
        """Return the present counts."""
        total, idle = self._connection.execute(self._query, {"database": self._database}).one()
        return Connections(int(total), int(idle))

    def settle(
        self, *, total: int | None = None, idle_in_transaction: int | None = None, within_s: float
    ) -> Connections:
        """Wait until no more than the given counts are left, or the time is over; return what is left."""
        deadline = time.monotonic() + within_s
        while True:
            seen = self.snapshot()
            few = total is None or seen.total <= total
            calm = idle_in_transaction is None or seen.idle_in_transaction <= idle_in_transaction
            if (few and calm) or time.monotonic() > deadline:
                return seen
            time.sleep(0.02)

    def close(self) -> None:
        """Close the observing connection."""
        self._connection.close()
        self._engine.dispose()


class Sampler:
    """Takes a snapshot every `interval_s` in a thread, while its block runs."""

    def __init__(self, server_url: URL, database: str, interval_s: float = 0.05) -> None:
        self.peak = 0
        """The most connections seen at once. A connection that opens and closes between two samples is missed."""
        self.samples = 0
        self.error: str | None = None
        """Why sampling ended early; None if it did not."""
        self._observer = Observer(server_url, database)
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="connection-sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._observer.close()

    def _sample(self) -> None:
        try:
            while not self._stopped.wait(self._interval_s):
                self.peak = max(self.peak, self._observer.snapshot().total)
                self.samples += 1
        except SQLAlchemyError as error:
            self.error = str(error)
