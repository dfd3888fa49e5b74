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
from ..scope import Scope, here
from ..unit_of_work import UnitOfWork
from .masking import masked

LONGEST_SHOWN = 200
"""Characters of a statement."""
_METHODS = ("do_execute", "do_executemany", "do_execute_no_params")
_watched: weakref.WeakSet[Dialect] = weakref.WeakSet()
#: Of threads and greenlets that use connections without a unit of work.
_outside: weakref.WeakKeyDictionary[Scope, Activity] = weakref.WeakKeyDictionary()
#: Not empty once somebody has asked what this process is doing.
_wanted: list[bool] = []


def activity_outside(scope: Scope) -> Activity | None:
    """Return what a thread or greenlet has executed outside of any unit of work; None where nothing was seen."""
    return _outside.get(scope)


class Activity:
    """What one unit of work, or a thread outside of any, has executed since it is watched.

    Times are of `time.monotonic`, in seconds.
    """

    __slots__ = ("_shown", "at", "dialect", "executing", "statement", "statements")

    @shield.covers
    def __init__(self) -> None:
        self.at: float = monotonic()
        """When its last statement began or ended."""
        self.statements: int = 0
        self.statement: str = ""
        """The last one, without its parameters; its literals may be secret."""
        self.dialect: str = ""
        """Of that statement."""
        self.executing: bool = False
        self._shown = ("", "")

    def shown(self) -> str:
        """Return the beginning of the last statement, its literals masked."""
        of, shown = self._shown
        if of is not self.statement:  # who looks again and again sees the same one for long
            of, dialect = self.statement, self.dialect
            shown = masked(str(of), dialect, LONGEST_SHOWN)  # psycopg takes objects, too
            self._shown = of, shown
        return shown


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
            setattr(dialect, name, _noting(getattr(dialect, name), dialect.name))


def _noting(execute: Callable[..., Any], dialect: str) -> Callable[..., Any]:
    @shield.covers
    def noting(cursor: Any, statement: str, *arguments: Any, **keywords: Any) -> Any:
        activity = _begins(statement, dialect)
        if activity is None:
            return execute(cursor, statement, *arguments, **keywords)
        try:
            return execute(cursor, statement, *arguments, **keywords)
        finally:
            activity.executing = False
            activity.at = monotonic()

    return noting


@shield.covers
def _begins(statement: str, dialect: str) -> Activity | None:
    """Note that a statement begins; return None where it is nobody's: SQLAlchemy asks a new connection who it is."""
    scope, top = here(), innermost_entry()
    if scope.connecting is not None:
        return None
    activity: Activity | None
    if top is not None:
        unit: UnitOfWork = top.unit
        activity = unit.activity
        if activity is None:
            activity = unit.activity = Activity()
    elif scope.held:
        activity = _outside.get(scope)
        if activity is None:
            activity = _outside[scope] = Activity()
    else:
        return None
    activity.statements += 1
    activity.dialect = dialect
    activity.statement = statement
    activity.executing = True
    activity.at = monotonic()
    return activity
