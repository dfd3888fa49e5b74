"""The statements of units of work, for those who want to know: `inspect sessions`, idle warnings, metrics.

Nothing is looked at until somebody asks: then the methods of a dialect that execute statements are replaced by ones
that note the beginning and the end. Events of the Engine would cost every statement 15 us, and do not tell of an end
that is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from sqlalchemy.engine import Dialect, Engine

from ..interrupts import shield
from ..options import DatabaseOptions
from ..registry import innermost_entry
from ..scope import here
from ..unit_of_work import UnitOfWork

_METHODS = ("do_execute", "do_executemany", "do_execute_no_params")
_watched: weakref.WeakSet[Dialect] = weakref.WeakSet()
#: Not empty once somebody has asked what this process is doing.
_wanted: list[bool] = []


class Activity:
    """What one unit of work has executed since it is watched. Times are of `time.monotonic`, in seconds."""

    __slots__ = ("at", "executing", "statement", "statements")

    @shield.covers
    def __init__(self) -> None:
        self.at = monotonic()
        """When its last statement began or ended."""
        self.statements = 0
        self.statement = ""
        """The last one, without its parameters."""
        self.executing = False


def watch_statements(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: note the statements of `engine`; once, and for good."""
    watch(engine.dialect)


def watch_where_wanted(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: note the statements of `engine` where `watch_now` has been called in this process."""
    if _wanted:
        watch(engine.dialect)


def watch_now(engines: Iterable[Engine]) -> None:
    """Note the statements of all Engines from now on: of these, which are in use already, and of those to come."""
    _wanted[:] = [True]
    for engine in engines:
        watch(engine.dialect)


def watch(dialect: Dialect) -> None:
    """Note the statements that `dialect` executes."""
    if dialect not in _watched:
        _watched.add(dialect)
        for name in _METHODS:
            setattr(dialect, name, _noting(getattr(dialect, name)))


def _noting(execute: Callable[..., Any]) -> Callable[..., Any]:
    @shield.covers
    def noting(cursor: Any, statement: str, *arguments: Any, **keywords: Any) -> Any:
        activity = _begins(statement)
        if activity is None:
            return execute(cursor, statement, *arguments, **keywords)
        try:
            return execute(cursor, statement, *arguments, **keywords)
        finally:
            activity.executing = False
            activity.at = monotonic()

    return noting


@shield.covers
def _begins(statement: str) -> Activity | None:
    """Note that a statement begins; return None where it belongs to no unit of work."""
    top = innermost_entry()
    if top is None:
        return None
    unit: UnitOfWork = top.unit
    if here().connecting is not None:
        return None  # SQLAlchemy asks a new connection who it is
    activity: Activity | None = unit.activity
    if activity is None:
        activity = unit.activity = Activity()
    activity.statements += 1
    activity.statement = statement
    activity.executing = True
    activity.at = monotonic()
    return activity
