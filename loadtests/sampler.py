"""What the database server says of the workload's connections."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

QUERIES = {
    "postgresql": """
        SELECT datname, count(*), count(*) FILTER (WHERE state LIKE 'idle in transaction%')
        FROM pg_stat_activity
        WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND datname = ANY(:databases)
        GROUP BY datname
    """,
    "mysql": """
        SELECT p.db, count(*), coalesce(sum(p.command = 'Sleep' AND t.trx_id IS NOT NULL), 0)
        FROM information_schema.processlist p
        LEFT JOIN information_schema.innodb_trx t ON t.trx_mysql_thread_id = p.id
        WHERE p.id <> connection_id() AND find_in_set(p.db, :databases)
        GROUP BY p.db
    """,
}
QUERIES["mariadb"] = QUERIES["mysql"]
INNODB_PAUSE_S = 0.12
"""InnoDB shows the transactions of a moment ago for as long as somebody looks more often than every 0.1 s."""
_innodb = threading.Lock()


@dataclass(frozen=True, slots=True)
class Connections:
    """The connections to one database, at one moment or at most."""

    total: int = 0
    idle_in_transaction: int = 0


class Observer:
    """Counts connections to databases over a connection of its own, which it leaves out."""

    def __init__(self, server_url: URL, *databases: str) -> None:
        self._engine = create_engine(server_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._connection = self._engine.connect()
        dialect = self._engine.dialect.name
        self._query = text(QUERIES[dialect])
        self._parameters = {"databases": list(databases) if dialect == "postgresql" else ",".join(databases)}
        self._databases = databases
        self._patient = dialect != "postgresql"

    def snapshots(self) -> dict[str, Connections]:
        """Return the present counts, by database; on MySQL and MariaDB one call of all at a time, and not at once."""
        if self._patient:
            with _innodb:
                time.sleep(INNODB_PAUSE_S)
                rows = self._connection.execute(self._query, self._parameters)
        else:
            rows = self._connection.execute(self._query, self._parameters)
        found = {name: Connections(int(total), int(idle)) for name, total, idle in rows}
        return {name: found.get(name, Connections()) for name in self._databases}

    def settle(
        self, database: str, *, total: int | None = None, idle_in_transaction: int | None = None, within_s: float
    ) -> Connections:
        """Wait until no more than the given counts are left, or the time is over; return what is left."""
        deadline = time.monotonic() + within_s
        while True:
            seen = self.snapshots()[database]
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
    """Takes snapshots every `interval_s` in a thread, while its block runs.

    Between two samples a connection can open and close unseen.
    """

    def __init__(self, server_url: URL, databases: Sequence[str], interval_s: float = 0.1) -> None:
        self.peaks = dict.fromkeys(databases, Connections())
        """The most seen at once, by database."""
        self.samples = 0
        self.error: str | None = None
        """Why sampling ended early; None if it did not."""
        self._observer = Observer(server_url, *databases)
        self._interval_s = interval_s
        self._blind_until = 0.0
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

    def forget(self) -> None:
        """Begin anew: the most seen from now on."""
        self.peaks = dict.fromkeys(self.peaks, Connections())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away during the block: connections of our own do not count."""
        self._blind_until = math.inf
        try:
            yield
        finally:
            # The server takes a moment to forget a connection that was closed.
            self._blind_until = time.monotonic() + self._interval_s

    def _sample(self) -> None:
        try:
            while not self._stopped.wait(self._interval_s):
                if time.monotonic() < self._blind_until:
                    continue
                for name, seen in self._observer.snapshots().items():
                    peak = self.peaks[name]
                    self.peaks[name] = Connections(
                        max(peak.total, seen.total), max(peak.idle_in_transaction, seen.idle_in_transaction)
                    )
                self.samples += 1
        except SQLAlchemyError as error:
            self.error = str(error)
