"""Warnings of units of work that sit idle in their transaction (`alchemy_warn_idle_s`)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ...strategies.names import counted
from .processes import reports

logger: logging.Logger = logging.getLogger(__name__)

ONE_TASK_EVERY_S = 60.0
"""Of one task, whatever its requests do, there is one warning in this time."""
_SHORTEST_S, _LONGEST_S = 0.1, 5.0

Report = tuple[int, dict[str, Any]]


class IdleWatch:
    """Looks at what is open, and warns: once for each gap between two statements.

    Args:
        limit_s: Seconds without a statement, in a transaction.
        read: Returns, with the pid of each, the reports of all that is open.
    """

    def __init__(self, limit_s: float, read: Callable[[], Iterable[Report]] | None = None) -> None:
        self.interval_s: float = min(max(limit_s / 3, _SHORTEST_S), _LONGEST_S)
        self._limit_s = limit_s
        self._read = read or read_open
        self._warned: set[tuple[Any, ...]] = set()
        self._last: dict[str, tuple[float, int]] = {}
        self._stopped = threading.Event()

    def start(self, worker: Any) -> None:
        """Look again and again: by the worker's timer, or where its one thread runs the tasks, in another thread."""
        if worker.pool_cls.__module__ == "celery.concurrency.solo":
            threading.Thread(target=self._run, name="celery-alchemy-idle", daemon=True).start()
        else:
            worker.timer.call_repeatedly(self.interval_s, self.look)

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self.interval_s):
            self.look()

    def look(self) -> None:
        """Warn of what is idle now, and was not warned of."""
        idle = set()
        for pid, one in self._read():
            if one["state"] != "idle in transaction" or (one["since_s"] or 0) < self._limit_s:
                continue
            gap = (pid, one["task"], one["id"], one["statements"])
            idle.add(gap)
            if gap not in self._warned:
                self._warn(pid, one)
        self._warned = idle

    def _warn(self, pid: int, one: dict[str, Any]) -> None:
        now = time.monotonic()
        last, suppressed = self._last.get(one["task"], (-ONE_TASK_EVERY_S, 0))
        if now - last < ONE_TASK_EVERY_S:
            self._last[one["task"]] = (last, suppressed + 1)
            return
        self._last[one["task"]] = (now, 0)
        name = f"{one['task']}[{one['id']}]" if one["id"] else one["task"]
        more = f" (and {suppressed} more of this task since the last warning)" if suppressed else ""
        logger.warning(
            "%s in pid %s has been idle in its transaction for %.3g s, after %s, the last: %s%s. Its "
            "connection and its locks are held meanwhile: commit, or call self.db.rollback(), before slow work.",
            name, pid, one["since_s"], counted(one["statements"] or 0, "statement"), one["statement"], more,
        )  # fmt: skip


def read_open() -> Iterable[Report]:
    """Return what is open in this process, or in prefork's pool processes."""
    return [(process["pid"], one) for process in reports() for one in process.get("open", ())]
