"""What the processes of a worker are doing: this one, or prefork's pool processes, which are asked."""

from __future__ import annotations

import os
from typing import Any

from ...strategies.watching.pool_processes import RECYCLE, REPORT, PoolProcesses
from ...strategies.watching.report import connections, report
from ...strategies.watching.statements import watch_now
from .. import apps

#: Of prefork's main process, and, until it has taken its own socket, of a pool process.
_pool_processes = PoolProcesses()
_FORKS: list[int] = []
"""The id of prefork's main process; empty in any other worker."""


def is_asking() -> bool:
    """Tell whether this is prefork's main process, whose pool processes are to be asked."""
    return [os.getpid()] == _FORKS


def begin(*, spawns: bool) -> str | None:
    """This is prefork's main process.

    Args:
        spawns: Its pool processes inherit nothing; what is returned is for `answer_at` there.
    """
    _FORKS[:] = [os.getpid()]
    return _pool_processes.open_door() if spawns else None


def end() -> None:
    """The worker is over."""
    if is_asking():
        _FORKS.clear()
        _pool_processes.close()


def before_fork() -> None:
    """A pool process is about to be forked."""
    if is_asking():
        _pool_processes.before_fork()


def answer_here() -> None:
    """Answer in this pool process, which has just begun."""
    if _FORKS and not is_asking():
        _pool_processes.in_child(_answer)


def answer_at(address: str) -> None:
    """Answer in this pool process, which was spawned."""
    _pool_processes.come_in(address, _answer)


def reports() -> list[dict[str, Any]]:
    """Return what every process of this worker is doing; from now on their statements are watched, too."""
    return _pool_processes.ask(REPORT) if is_asking() else [_answer(REPORT)]


def recycle() -> None:
    """Let no connection that is open now serve another unit of work."""
    if is_asking():
        _pool_processes.ask(RECYCLE)
    else:
        _answer(RECYCLE)


def _answer(question: bytes) -> dict[str, Any]:
    """Do what the main process asks of this process."""
    started = [db for db in apps.every() if db.units.strategy is not None]
    if question == RECYCLE:
        for db in apps.every():
            for strategy in {db.units.strategy, db.coroutines.started} - {None}:
                strategy.recycle()
        return {"pid": os.getpid()}
    engines = [engine for db in started for engine in db.units.strategy.engines_made()]
    found = {"pid": os.getpid(), **report(db.units for db in started)}
    watch_now(engines)
    found["connections"] = {
        db.database: connections(db.units.strategy.engines_made() if db in started else ()) for db in apps.every()
    }
    return found
