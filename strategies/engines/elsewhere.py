"""What is committed while the body of a task runs, beside its own transaction: that body cannot simply run again.

COMMITs of the thread or greenlet are counted where they are sent (`scope.commits`), those of code when SQLAlchemy ends
what it takes for its transaction (`scope.ends`). Not all are: an Engine in AUTOCOMMIT sends none, one that is not ours
is not followed, and a helper thread counts for itself. So who checks out a connection meanwhile is looked at, of
whichever connection pool of the process, by a listener on the class `Pool`. It is put there when it is first needed, in
a worker when that starts: SQLAlchemy fails a thread that goes through a list of listeners which another one adds to.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from ..scope import Scope, here, living_scopes
from .held import holding_of
from .leaks import describe, find_origin

_running: list[Attempt] = []
_unnoted: set[Scope] = set()
_listening = threading.Lock()


def listen() -> None:
    """Look at the connections that are checked out in this process from now on."""
    with _listening:
        if not event.contains(Pool, "checkout", _on_checkout):
            event.listen(Pool, "checkout", _on_checkout)


class unnoted(AbstractContextManager[None]):  # noqa: N801 - used as a function is
    """Let what the block executes, on connections of its own, be none of what is committed meanwhile. A class, for each
    task with `exactly_once` enters one."""

    __slots__ = ("_before", "_scope")

    def __enter__(self) -> None:
        self._scope = scope = here()
        self._before = scope.commits, scope.ends
        _unnoted.add(scope)

    def __exit__(self, *exc_info: object) -> None:
        _unnoted.discard(self._scope)
        self._scope.commits, self._scope.ends = self._before


class Attempt:
    """One run of a body, in the thread or greenlet that makes this. `end` must follow."""

    __slots__ = ("_before", "_commits", "_elsewhere", "_helpers", "_scope")

    def __init__(self) -> None:
        self._scope = here()
        self._before, self._commits = _count(self._scope), self._scope.commits
        self._elsewhere: str | None = None
        self._helpers = [
            (scope, _count(scope))
            for scope in living_scopes()
            if scope.held and scope is not self._scope and not _runs_task(scope) and scope not in _unnoted
        ]
        listen()
        _running.append(self)

    def end(self) -> None:
        """Look no more."""
        _running.remove(self)

    def has_committed(self) -> bool:
        """Tell whether its thread or greenlet has committed since what may have written."""
        return self._scope.commits > self._commits

    def found(self) -> str | None:
        """Return what was, or may have been, committed since; None where nothing was."""
        if _count(self._scope) != self._before:
            return "it has committed something, or has ended a transaction otherwise than by its Session"
        if any(_count(scope) != before for scope, before in self._helpers):
            return "a thread without a task has committed something meanwhile"
        return self._elsewhere

    def note(self, scope: Scope, by_unit: bool) -> None:
        """`scope`, which is in no other task, has checked a connection out, for a unit of work or on its own."""
        if not by_unit:
            self._elsewhere = f"a connection was used beside its Session, at {describe(find_origin())}"
        elif scope is not self._scope:
            self._helpers.append((scope, _count(scope)))


def _on_checkout(dbapi_connection: object, record: ConnectionPoolEntry, fairy: Any) -> None:
    if not _running:
        return
    scope, holding = here(), holding_of(record)
    if scope in _unnoted:
        return
    for attempt in list(_running):
        if attempt._scope is scope or not _runs_task(scope):
            attempt.note(scope, holding is not None and holding.unit is not None)


def _count(scope: Scope) -> int:
    return scope.commits + scope.ends


def _runs_task(scope: Scope) -> bool:
    return bool(scope.units and scope.units[-1].in_task)
