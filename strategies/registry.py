"""The open units of work of this process: which one is current in which thread or greenlet."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.pool import ConnectionPoolEntry

from .base import SessionStrategy
from .engines import forks
from .engines.held import checkouts, take_back
from .errors import CeleryAlchemyError, NoUnitOfWork
from .features.read_only import IN_TRANSACTION, ReadOnly
from .interrupts import is_interrupt, shield
from .on_commit import Callback
from .scope import ScopeStack, describe_current_scope
from .sessions import connections_of
from .several.several_units import Parts
from .unit_of_work import Label, UnitOfWork
from .watching.activity import activities

logger = logging.getLogger(__name__)


class Frame:
    """One entry of the stack: a unit of work, and who runs in it.

    A task that is called like a function joins the unit of its caller: a frame of its own over the same unit.
    """

    coroutine: object = None
    """The asyncio task that opened a block; None outside an event loop."""
    left = False
    """True once it has been taken off the stack."""
    home: list[Frame] | None = None
    """The stack it is on."""
    held: Sequence[ConnectionPoolEntry] = ()
    """What its thread or greenlet had checked out when it began."""

    def __init__(
        self, owner: UnitsOfWork, unit: UnitOfWork, owns: bool, ends: bool, kind: str, holder: Any, request: Any
    ) -> None:
        self.owner = owner
        self.unit = unit
        self.owns = owns
        """Releases the unit of work when it leaves."""
        self.ends = ends
        """Commits or rolls back when it leaves."""
        self.kind = kind
        self.holder = holder
        self.request = request


#: From the connection pool through Engine.connect up to the Session that called it, in SQLAlchemy 2.0 and 2.1.
_SESSIONS_FRAME = 9

#: One stack for all `Alchemy` objects of the process: nesting is a matter of the thread, not of the database.
frames: ScopeStack[Frame] = ScopeStack(lasting=True)
_TASK_KINDS = frozenset({"run", "call", "hook"})


class RunningScope:
    """What connection pools ask about the thread or greenlet that is running."""

    def labels(self) -> str:
        """Name its open units of work, the innermost first, for a message."""
        stack = frames.get() or ()
        labels = list(dict.fromkeys(frame.unit.label for frame in reversed(stack)))
        return " inside ".join(labels) or describe_current_scope()

    def connects(self) -> bool:
        """Tell whether the Session of its innermost unit of work is connecting now; called by the connection pool."""
        top = frames.top()
        if top is None or not any(_may_connect(unit) for unit in top.unit.all_parts):
            return False
        try:
            # Code of the task's that connects by itself does not come through a Session.
            return sys._getframe(_SESSIONS_FRAME).f_code.co_name == "_connection_for_bind"
        except ValueError:  # a script that calls `raw_connection` is not as deep
            return False

    def executing(self, statement: str) -> None:
        """A statement begins."""
        top = frames.top()
        if top is not None and top.unit.activity is not None:
            # Each statement of what is only read commits itself.
            activities.executing(top.unit.activity, statement, in_transaction=top.unit.read_only is not True)

    def executed(self) -> None:
        """It is over, however."""
        top = frames.top()
        if top is not None and top.unit.activity is not None:
            activities.executed(top.unit.activity)

    def returned(self) -> None:
        """A connection has come back: where it was the last one, no transaction is open."""
        if not checkouts.get():
            for frame in frames.get() or ():
                if frame.unit.activity is not None and frame.unit.activity.in_transaction:
                    activities.transaction_over(frame.unit.activity)

    def runs_task(self) -> bool:
        """Tell whether it runs a task request; a helper thread of one, or a script, does not."""
        return any(frame.kind in _TASK_KINDS for frame in frames.get() or ())


def _may_connect(unit: UnitOfWork) -> bool:
    session = unit.opened
    return session is not None and session.in_transaction() and not connections_of(session)


def observe_error(error: BaseException, connection: Connection | None, lost: bool) -> None:
    """Tell the unit of work whose connection it is of a database error; `lost`: the transaction is rolled back."""
    for frame in reversed(frames.get() or ()):
        for unit in frame.unit.all_parts:
            session = unit.opened
            if session is not None and connection is not None and connection in connections_of(session):
                unit.observed(error, lost)
                return


class UnitsOfWork:
    """Opens, finds and ends the units of work of one `Alchemy`.

    Args:
        strategy: Returns the SessionStrategy in force.
    """

    leader: UnitsOfWork | None = None
    """Of the app's default database: its units of work are over this database too. None: this is the default."""
    position = 0
    """The place of this database in the order of COMMITs."""

    def __init__(self, strategy: Callable[[], SessionStrategy]) -> None:
        self._strategy = strategy
        forks.forget_after_fork(frames)
        forks.on_fork(activities.forget)

    def unit_of(self, frame: Frame) -> UnitOfWork:
        """Return the unit of work of `frame` on this database, which joins it with its first use."""
        return frame.unit if frame.owner is self else self._part(frame.unit)

    @shield.covers
    def _part(self, whole: UnitOfWork) -> UnitOfWork:
        parts = whole.parts
        if parts is None:
            parts = whole.parts = Parts(whole)
        part = parts.get(self)
        if part is None:
            strategy = self._strategy()
            part = whole.new_part(strategy)
            strategy.enter(part)
            parts.add(self, self.position, part)
        return part

    def _serves(self, frame: Frame) -> bool:
        return frame.owner is self or (self.leader is not None and frame.owner is self.leader)

    # -- finding -----------------------------------------------------------------------------------------------------

    def current_frame(self) -> Frame | None:
        """Return the innermost frame of this thread or greenlet; None when there is none."""
        stack = frames.get()
        if stack:
            for frame in reversed(stack):
                if self._serves(frame):
                    if frame.coroutine is not None and frame.coroutine is not _current_coroutine():
                        raise CeleryAlchemyError(_taking_turns("A Session was asked for", frame))
                    return frame
        return None

    def is_open(self) -> bool:
        """Tell whether a unit of work is open here; one of another coroutine of this thread is not."""
        for frame in reversed(frames.get() or ()):
            if self._serves(frame):
                return frame.coroutine is None or frame.coroutine is _current_coroutine()
        return False

    def frame_of(self, holder: object) -> Frame | None:
        """Return the innermost frame in which `holder` (a task) runs; None when it does not run here.

        An on_commit callback hides what is below it: the unit of work there is over.
        """
        stack = frames.get()
        if stack:
            for frame in reversed(stack):
                if (frame.holder is holder or frame.kind == "callback") and self._serves(frame):
                    return frame
        return None

    def above(self, frame: Frame) -> list[Frame]:
        """Return the frames of units of work opened inside `frame` and still open, the innermost first."""
        stack = frames.get() or []
        inner = stack[stack.index(frame) + 1 :] if frame in stack else []
        return [found for found in reversed(inner) if found.owns]

    def current(self) -> UnitOfWork:
        """Return the unit of work now running in this thread or greenlet.

        Raises:
            NoUnitOfWork: there is none.
        """
        frame = self.current_frame()
        if frame is None:
            raise no_unit_of_work("db.session")
        return self.unit_of(frame)

    # -- beginning and ending ----------------------------------------------------------------------------------------

    @shield.covers
    def begin(
        self,
        label: Label,
        *,
        commits: bool,
        kind: str,
        holder: object = None,
        request: object = None,
        read_only: ReadOnly = False,
    ) -> Frame:
        """Open a unit of work of its own; no Session yet."""
        strategy = self._strategy()
        if read_only and strategy.engines.terms.external_pooler:
            read_only = IN_TRANSACTION  # a connection cannot be set read-only: it is everybody's
        unit = UnitOfWork(strategy, label, commits, not frames.get(), self._run_callback, read_only)
        strategy.enter(unit)
        frame = Frame(self, unit, True, True, kind, holder, request)
        if held := checkouts.get():
            frame.held = list(held)
        frame.home = frames.push(frame)
        activities.begin(unit)
        return frame

    @shield.covers
    def join(self, frame: Frame, *, kind: str, holder: object, request: object = None, ends: bool = False) -> Frame:
        """Let `holder` run in the unit of work of `frame`, which releases it and, unless `ends`, ends it."""
        joined = Frame(self, frame.unit, False, ends, kind, holder, request)
        joined.home = frames.push(joined)
        return joined

    @shield.covers
    def leave(self, frame: Frame, error: BaseException | None = None) -> None:
        """Take `frame` off the stack and, where it owns its unit of work, release that."""
        unit = frame.unit
        if frame.left:
            return  # an abandoned block's generator is closed by the garbage collector, long after `sweep`
        frame.left = True
        if not frame.owns:
            frames.remove(frame, frame.home)
            return
        if unit.opened is None and unit.parts is None:
            _end(frame)
            return
        if not shield.installed:
            try:
                unit.close()
            finally:
                _end(frame)
            return
        with shield:
            try:
                unit.close()
            finally:
                _end(frame)
            if unit.outermost and error is not None and is_interrupt(error):
                taken = sum(part.strategy.take_back() for part in unit.all_parts)
                if taken:
                    logger.info("%s: %s connection(s) taken back after %s", unit.label, taken, type(error).__name__)

    def sweep(self) -> None:
        """End what an interruption between two bytecodes left on the stack of this thread or greenlet: a request that
        the worker has just begun is inside nothing."""
        for frame in reversed(list(frames.get() or ())):
            logger.warning("%s was interrupted before it could be ended; it is rolled back now", frame.unit.label)
            frame.owner.leave(frame)

    @contextmanager
    @shield.covers
    def open(self, label: str, *, commits: bool, kind: str, read_only: ReadOnly = False) -> Iterator[UnitOfWork]:
        """Open a unit of work of its own and end it with the block: commit, or roll back when the block raises."""
        coroutine = _current_coroutine()
        top = frames.top()
        if top is not None and top.coroutine is not None and top.coroutine is not coroutine:
            raise CeleryAlchemyError(_taking_turns(f"{label} would be opened", top))
        frame = self.begin(label, commits=commits, kind=kind, read_only=read_only)
        frame.coroutine = coroutine
        error: BaseException | None = None
        try:
            try:
                yield frame.unit
            except BaseException as raised:
                error = raised
                frame.unit.fail(raised)
                raise
            frame.unit.succeed(final=True)
        finally:
            self.leave(frame, error)
        shield.check()

    def _run_callback(self, callback: Callback) -> None:
        named = getattr(callback, "func", callback)  # of a partial; its arguments are nobody's business
        label = f"on_commit callback {getattr(named, '__qualname__', type(named).__name__)}"
        with self.open(label, commits=True, kind="callback"):
            callback()


@shield.covers
def _end(frame: Frame) -> None:
    """Take `frame`, whose Session is closed, off the stack, with whatever its code has kept."""
    frames.remove(frame, frame.home)
    if checkouts.get():
        _take_back(frame)
    try:
        activities.end(frame.unit)
    finally:
        for unit in frame.unit.all_parts:
            unit.strategy.leave(unit)


@shield.covers
def _take_back(frame: Frame) -> None:
    """Give back what the code of a task request has checked out, and kept: in the request it ends with nobody else may
    ever give it back, and the connection pool would lose a slot for each."""
    if frame.kind not in _TASK_KINDS or not frame.unit.outermost:
        return
    kept = [record for record in checkouts.get() or () if record not in frame.held]
    places = take_back(kept)
    activities.leaked(len(places))
    for place in places:
        logger.warning(
            "%s has ended, and a connection is still checked out. It is taken back and closed. It was checked out at "
            "%s: close it there, or use `with`.",
            frame.unit.label, place,
        )  # fmt: skip


def _taking_turns(what: str, frame: Frame) -> str:
    return (
        f"{what} inside {frame.unit.label}, which another coroutine of this thread has open. Sessions are not for "
        f"coroutines that take turns: do not await inside the block, or run it in a thread (asyncio.to_thread)."
    )


def _current_coroutine() -> object:
    """Return the running asyncio task; None where there is no event loop."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()


def no_unit_of_work(what: str) -> NoUnitOfWork:
    return NoUnitOfWork(
        f"{what} was used in {describe_current_scope()}, where no unit of work is open. A thread or greenlet that a "
        f"task starts has none of its own, and a Session must not be shared. Open one there: "
        f"`with db.unit_of_work() as session:`."
    )


def place(depth: int) -> str:
    """Return `file:line` of the caller `depth` frames up, to name an unnamed block."""
    caller = sys._getframe(depth)
    return f"{caller.f_code.co_filename}:{caller.f_lineno}"
