"""What can be seen of the processes from outside: connections, CPU seconds by process tree, memory."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

import psutil
from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

MYSQL = """
    SELECT p.db, count(*), coalesce(sum(p.command = 'Sleep' AND t.trx_id IS NOT NULL), 0)
    FROM information_schema.processlist p
    LEFT JOIN information_schema.innodb_trx t ON t.trx_mysql_thread_id = p.id
    WHERE p.id <> connection_id() AND find_in_set(p.db, :databases)
    GROUP BY p.db
"""
POSTGRESQL = """
    SELECT {by}, count(*), count(*) FILTER (WHERE state LIKE 'idle in transaction%')
    FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND {by} = ANY(:databases)
    GROUP BY {by}
"""
INNODB_PAUSE_S = 0.12  # InnoDB shows the transactions of a moment ago to those that look more often than every 0.1 s


class Connections(NamedTuple):
    """The connections to one database, at one moment or at most."""

    total: int = 0
    idle_in_transaction: int = 0


class Sampler:
    """Takes snapshots every `interval_s` in a thread, while its block runs, over a connection that it leaves out.

    Between two samples a connection can open and close unseen.
    """

    def __init__(self, server_url: URL, databases: Sequence[str], interval_s: float = 0.1, by: str = "datname") -> None:
        """Connect.

        Args:
            by: `application_name` counts by what programs call themselves, on PostgreSQL only.
        """
        self.peaks: dict[str, Connections] = dict.fromkeys(databases, Connections())
        """The most seen at once, by database."""
        self.error: str | None = None  # Why sampling ended early; None if it did not
        self._engine = create_engine(server_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._connection, self._lock = self._engine.connect(), threading.Lock()
        self._patient = self._engine.dialect.name != "postgresql"
        self._query = text(MYSQL if self._patient else POSTGRESQL.format(by=by))
        self._interval_s = interval_s
        self._blind_until = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="connection-sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._connection.close()

    def snapshots(self) -> dict[str, Connections]:
        """Return the present counts, by database; on MySQL and MariaDB not at once."""
        names = list(self.peaks)
        with self._lock:
            if self._patient:
                time.sleep(INNODB_PAUSE_S)
            rows = self._connection.execute(self._query, {"databases": ",".join(names) if self._patient else names})
        found = {name: Connections(int(total), int(idle)) for name, total, idle in rows}
        return {name: found.get(name, Connections()) for name in names}

    def settle(
        self, database: str, *, total: float = math.inf, idle_in_transaction: float = math.inf, within_s: float
    ) -> Connections:
        """Wait until no more than the given counts are left, or the time is over; return what is left."""
        deadline = time.monotonic() + within_s
        while True:
            seen = self.snapshots()[database]
            calm = seen.total <= total and seen.idle_in_transaction <= idle_in_transaction
            if calm or time.monotonic() > deadline:
                return seen
            time.sleep(0.02)

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
                if time.monotonic() >= self._blind_until:
                    for name, seen in self.snapshots().items():
                        self.peaks[name] = Connections(*map(max, self.peaks[name], seen))
        except SQLAlchemyError as error:
            self.error = str(error)


@dataclass(frozen=True, slots=True)
class CpuClock:
    """CPU seconds spent by every process tree of the machine, up to one moment.

    The kernel counts in ticks, usually 10 ms for each process; differences between two moments do not add up errors.
    """

    _children: dict[int, list[int]]
    _seconds: dict[int, float]
    busy_s: float  # By everything on the machine, on all CPUs
    at: float

    @classmethod
    def read(cls) -> Self:
        """Read the clocks of all processes."""
        children: defaultdict[int, list[int]] = defaultdict(list)
        seconds: dict[int, float] = {}
        for process in psutil.process_iter(["ppid", "cpu_times"]):
            if times := process.info["cpu_times"]:
                children[process.info["ppid"]].append(process.pid)
                # Children that have ended and were waited for count for their parent: servers that fork to connect.
                seconds[process.pid] = times.user + times.system + times.children_user + times.children_system
        machine = psutil.cpu_times()
        # Guests are counted in user and nice already, and nothing of ours runs in what was stolen.
        idle = machine.idle + sum(getattr(machine, name, 0.0) for name in ("iowait", "guest", "guest_nice", "steal"))
        return cls(dict(children), seconds, sum(machine) - idle, time.monotonic())

    def spent_by(self, *roots: int | None) -> float:
        """Return what some processes and all their descendants have spent."""
        found, todo = set[int](), [root for root in roots if root]
        while todo:
            pid = todo.pop()
            if pid not in found:
                found.add(pid)
                todo += self._children.get(pid, ())
        return sum(self._seconds.get(pid, 0.0) for pid in found)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a stretch of time cost."""

    wall_s: float
    worker_s: float
    database_s: float | None
    foreign_cpus: float  # CPUs busy with what is not ours, on average


def spent(begin: CpuClock, worker_pid: int, database_pid: int | None) -> Spent:
    """Return what was spent since a reading."""
    end = CpuClock.read()
    wall_s = end.at - begin.at

    def of(*roots: int | None) -> float:
        # A process that ended unwaited takes its seconds with it.
        return max(0.0, end.spent_by(*roots) - begin.spent_by(*roots))

    # Every server, worker and load generator we start is below this process; a database server need not be.
    foreign_s = end.busy_s - begin.busy_s - of(os.getpid(), database_pid)
    return Spent(
        wall_s, of(worker_pid), of(database_pid) if database_pid else None, max(0.0, foreign_s) / max(wall_s, 1e-9)
    )


def memory_bytes(root: int) -> int:
    """Return the proportional set size of a process tree: shared pages counted once, by their shares.

    Where the system does not know it, the unique set size, which leaves shared pages out.
    """
    total = 0
    with contextlib.suppress(psutil.Error):
        main = psutil.Process(root)
        for process in (main, *main.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                memory = process.memory_full_info()
                total += getattr(memory, "pss", 0) or memory.uss
    return total
