"""What the units of work of this process are doing: for `celery inspect sessions`, for warnings and for metrics."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..interrupts import is_interrupt, shield

if TYPE_CHECKING:
    from ..unit_of_work import Label, UnitOfWork
    from .board import Board
    from .observer import Observer


logger = logging.getLogger(__name__)


class Activity:
    """What one unit of work has done so far. Times are of `time.monotonic`, in seconds."""

    __slots__ = (
        "__weakref__",
        "_label",
        "at",
        "began",
        "executing",
        "in_transaction",
        "place",
        "statement",
        "statements",
    )

    @shield.covers
    def __init__(self, label: Label) -> None:
        self._label = label
        self.began = self.at = monotonic()
        """When it began, and when its last statement began or ended."""
        self.statements = 0
        self.statement = ""
        """The last one, without its parameters."""
        self.executing = False
        self.in_transaction = False
        self.place = 0
        """Its place on the board."""

    @property
    def label(self) -> str:
        """The name of its unit of work, put together when somebody asks."""
        return self._label if isinstance(self._label, str) else f"{self._label[0]}[{self._label[1]}]"

    def report(self, now: float) -> dict[str, Any]:
        """Return what people want to know of it."""
        return describe(
            self.label,
            now,
            self.began,
            self.at,
            self.statements,
            self.statement,
            self.executing,
            self.in_transaction,
        )


def describe(
    label: str, now: float, began: float, at: float, statements: int, statement: str, executing: bool, open_: bool
) -> dict[str, Any]:
    """Return the report of a unit of work, ages in seconds."""
    name, bracket, rest = label.partition("[")
    return {
        "task": name if bracket else label,
        "id": rest.rstrip("]") if bracket else None,
        "age_s": round(now - began, 3),
        "statements": statements,
        "state": "in a statement" if executing else "idle in transaction" if open_ else "no transaction",
        "since_s": round(now - at, 3),
        "statement": statement[:200],
    }


@contextmanager
def _harmless() -> Iterator[None]:
    """Let an observer that fails fail no task."""
    try:
        yield
    except Exception as error:
        if is_interrupt(error):
            raise
        logger.exception("alchemy_metrics: the observer failed")


def _nothing() -> None:
    """There is nothing to be done."""


class Activities:
    """All that is open in this process, and what was."""

    def __init__(self) -> None:
        self.open: weakref.WeakSet[Activity] = weakref.WeakSet()
        """Weakly: a greenlet that dies with a unit of work open takes it along."""
        self._depth = 0
        self.ended = 0
        self.leaks = 0
        self.longest: tuple[float, str] = (0.0, "")
        self.board: Board | None = None
        """Where a pool process writes it for the worker's main process to read; None elsewhere."""
        self.obey: Callable[[], object] = _nothing
        """Called in a pool process when the main process wants its connections closed."""
        self.observer: Observer | None = None
        """Is told of every end, where there are metrics."""

    @shield.covers
    def begin(self, unit: UnitOfWork) -> None:
        """Note that `unit` begins."""
        if self.board is not None and self.board.ordered():
            self.obey()
        activity = unit.activity = Activity(unit._label)
        self.open.add(activity)
        if self.board is not None:
            activity.place, self._depth = self._depth, self._depth + 1
            self.board.write(activity)

    @shield.covers
    def end(self, unit: UnitOfWork) -> None:
        """Note that `unit` is over."""
        activity = unit.activity
        if activity is None:
            return
        self.open.discard(activity)
        self.ended += 1
        duration_s = monotonic() - activity.began
        if duration_s > self.longest[0]:
            self.longest = (duration_s, unit.label)
        if self.board is not None:
            self._depth = activity.place
            self.board.erase(activity.place)
            self.board.write_totals(self, unit)
        if self.observer is not None:
            with _harmless():
                self.observer.unit_ended(unit, duration_s)
        unit.activity = None  # no cycle: what a task has loaded is freed when it ends, not when the collector comes

    @shield.covers
    def executing(self, activity: Activity, statement: str, *, in_transaction: bool) -> None:
        """Note that a statement begins."""
        activity.statements += 1
        activity.statement = statement
        activity.executing, activity.in_transaction = True, in_transaction
        activity.at = monotonic()
        if self.board is not None:
            self.board.write_statement(activity)

    @shield.covers
    def executed(self, activity: Activity) -> None:
        """Note that it is over."""
        activity.executing = False
        activity.at = monotonic()
        if self.board is not None:
            self.board.touch(activity)

    @shield.covers
    def transaction_over(self, activity: Activity) -> None:
        """Note that nothing is held any more."""
        activity.in_transaction = False
        if self.board is not None:
            self.board.touch(activity)

    def leaked(self, count: int) -> None:
        """Note that connections had to be taken back."""
        self.leaks += count
        if self.observer is not None and count:
            with _harmless():
                self.observer.leaked(count)

    def waited(self, database: str, wait_s: float) -> None:
        """Note how long a checkout took."""
        if self.observer is not None:
            with _harmless():
                self.observer.waited(database, wait_s)

    def report(self) -> dict[str, Any]:
        """Return what is open now, the oldest first, and what was."""
        now = monotonic()
        return {
            "open": [activity.report(now) for activity in sorted(self._alive(), key=lambda one: one.began)],
            "ended": self.ended,
            "longest": {"task": self.longest[1], "s": round(self.longest[0], 3)} if self.longest[1] else None,
            "leaks": self.leaks,
        }

    def _alive(self) -> list[Activity]:
        while True:
            try:
                return list(self.open)
            except RuntimeError:  # another thread has begun or ended one meanwhile
                continue

    def forget(self) -> None:
        """Begin anew, in the child of a fork; whoever measures goes on."""
        observer = self.observer
        self.__init__()  # type: ignore[misc]
        self.observer = observer


#: Of this process.
activities = Activities()
