"""The open units of work of this process: which one is current in which thread or greenlet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator
from time import monotonic
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from ._sqlalchemy import connections_of
from .base import SessionStrategy
from .engines import forks
from .engines.held import holding_of
from .engines.leaks import describe, take_back
from .entry import TASK_KINDS, Entry, Joined, Label, UnitOptions, move_here, take_off, written
from .errors import CeleryAlchemyError, NoUnitOfWork
from .event_loops import refuse_to_block
from .interrupts import shield
from .on_commit import Callback
from .place import come_back, enter, is_here, is_strange, leave_place
from .scope import SCOPE, Scope, current_scope, describe_current_scope, here, living_scopes
from .unit_of_work import UnitOfWork

logger: logging.Logger = logging.getLogger(__name__)


def open_entries() -> list[Entry]:
    """Return the entries of this thread or greenlet, the innermost last."""
    return here().units


def innermost_entry() -> Entry | None:
    """Return the innermost entry of this thread or greenlet; None where there is none."""
    scope: Scope = getattr(current_scope(), SCOPE, None) or here()
    units = scope.units
    return units[-1] if units else None


def open_units() -> list[UnitOfWork]:
    """Return the units of work that are open now, in any thread or greenlet of this process."""
    return [entry for scope in living_scopes() for entry in list(scope.units) if isinstance(entry, UnitOfWork)]


def innermost(strategy: object) -> UnitOfWork | None:
    """Return the innermost unit of work of `strategy` in this thread or greenlet; None where there is none."""
    for entry in reversed(open_entries()):
        whole: UnitOfWork = entry.unit
        for unit in whole.all_units:
            if unit.strategy is strategy and not is_strange(entry.coroutine):
                return unit
    return None


class RunningScope:
    """What Engines ask about the thread or greenlet that is running."""

    def describe_holder(self) -> str:
        """Name its open units of work, the innermost first, for a message."""
        labels = list(dict.fromkeys(entry.unit.label for entry in reversed(open_entries())))
        return " inside ".join(labels) or describe_current_scope()

    def waits_in_line(self, scope: Scope, connections: int) -> bool:
        """Tell whether `scope` is to wait with the tasks that compete for so many `connections`, and may have none in
        reserve: a task runs in it. Celery's workers know it better."""
        return bool(scope.units) and bool(scope.units[-1].in_task)


def observe_error(error: BaseException, connection: Connection | None) -> None:
    """Tell the unit of work whose connection it is of a database error."""
    for entry in reversed(open_entries()):
        for unit in entry.unit.all_units:
            session = unit.opened
            if session is not None and connection is not None and connection in connections_of(session):
                unit.observed(error)
                return


class UnitOfWorkRegistry:
    """Opens, finds and ends the units of work of one database of an app.

    Args:
        start: Sets `strategy` and `unit_class`; called at first use, where no worker has set them.
        options: How blocks and callbacks are treated, by `commits` and `read_only`.
    """

    strategy: SessionStrategy | None = None
    """The strategy in force; None: not started yet."""
    unit_class: type[UnitOfWork] = UnitOfWork
    """Units of work over one database or several, with or without a soft time limit to hold back."""
    default: UnitOfWorkRegistry | None = None
    """Of the app's default database: its units of work are over this database too. None: this is the default."""
    position = 0
    """The place of this database in the order of COMMITs."""
    twin: UnitOfWorkRegistry | None = None
    """The registry of the same database for coroutines."""
    twin_of: UnitOfWorkRegistry | None = None
    """Of the registry of coroutines: that of the same database for ordinary code, which finds its units of work too."""

    def __init__(self, start: Callable[[], object], options: Callable[..., UnitOptions]) -> None:
        self._start = start
        self._options = options
        self._made_options: dict[tuple[bool, Any], UnitOptions] = {}
        self.ended: int = 0
        """Units of work that are over."""
        self.leaks: int = 0
        """Connections that had to be taken back."""
        self.longest_s: float = 0.0
        self.longest: Label = ""
        """What the label of the longest unit of work so far is made of."""
        forks.on_fork(self.after_fork)

    def after_fork(self) -> None:
        """Begin anew in the child: what was open belongs to the parent."""
        self.ended = self.leaks = 0
        self.longest_s, self.longest = 0.0, ""

    def started(self) -> SessionStrategy:
        """Return the strategy in force, chosen now where no worker has chosen it.

        Raises:
            InvalidSetting: the settings do not say enough, or something that cannot work.
        """
        if self.strategy is None:
            self._start()
        assert self.strategy is not None
        return self.strategy

    def options_like(self, options: UnitOptions) -> UnitOptions:
        """Return how a unit of work with these options, of another database, is treated on this one."""
        return self._options(commits=options.commits, read_only=options.read_only, extra=options.extra)

    def unit_of(self, entry: Entry) -> UnitOfWork:
        """Return the unit of work of `entry` on this database, which joins it with its first use."""
        whole: UnitOfWork = entry.unit
        own = entry.registry is self or entry.registry.twin_of is self
        return whole if own else whole.part_of(self, self.started, self.position)

    def _serves(self, entry: Entry) -> bool:
        registry, default = entry.registry, self.default
        return (
            registry is self
            or registry.twin_of is self
            or (default is not None and (registry is default or registry.twin_of is default))
        )

    # -- finding -----------------------------------------------------------------------------------------------------

    def current_entry(self) -> Entry | None:
        """Return the innermost entry of this thread or greenlet; None when there is none."""
        for entry in reversed(open_entries()):
            if self._serves(entry) and not is_strange(entry.coroutine):
                if not is_here(entry.coroutine):
                    raise CeleryAlchemyError(_taking_turns("A Session was asked for", entry))
                return entry
        return None

    def is_open(self) -> bool:
        """Tell whether a unit of work is open here; one of another coroutine of this thread is not, nor one that
        another request has left open in it."""
        for entry in reversed(open_entries()):
            if self._serves(entry) and not is_strange(entry.coroutine):
                return is_here(entry.coroutine)
        return False

    def entry_of(self, holder: object) -> Entry | None:
        """Return the innermost entry in which `holder` (a task) runs; None when it does not run here.

        An on_commit callback hides what is below it: the unit of work there is over.
        """
        for entry in reversed(open_entries()):
            if (entry.holder is holder or entry.kind == "callback") and self._serves(entry):
                return entry
        return None

    def above(self, entry: Entry) -> list[UnitOfWork]:
        """Return the units of work opened inside `entry` and still open, the innermost first."""
        stack = open_entries()
        inner = stack[stack.index(entry) + 1 :] if entry in stack else []
        return [found.unit for found in reversed(inner) if found.owns]

    def current(self) -> UnitOfWork:
        """Return the unit of work now running in this thread or greenlet.

        Raises:
            NoUnitOfWork: there is none.
        """
        entry = self.current_entry()
        if entry is None:
            raise no_unit_of_work("db.session")
        return self.unit_of(entry)

    # -- beginning and ending ----------------------------------------------------------------------------------------

    @shield.covers
    def begin(
        self, options: UnitOptions, label: Label, kind: str, holder: object = None, request: object = None
    ) -> UnitOfWork:
        """Open a unit of work of its own; no Session yet."""
        strategy = self.strategy or self.started()
        unit = self.unit_class()
        unit.strategy, unit.options, unit.registry, unit.titled = strategy, options, self, label
        unit.kind, unit.holder, unit.request, unit.began = kind, holder, request, monotonic()
        scope: Scope = getattr(current_scope(), SCOPE, None) or here()
        unit.scope = scope
        stack = scope.units
        if stack:
            unit.outermost = False
        if kind not in TASK_KINDS:
            unit.in_task = bool(stack and stack[-1].in_task)
        stack.append(unit)
        if scope.held:
            unit.held = list(scope.held)
        if strategy.follows_units:
            strategy.enter(unit)
        if options.hooks:
            for hook in options.hooks:
                hook.begun(unit)
        return unit

    @shield.covers
    def join(self, entry: Entry, *, kind: str, holder: object, request: object = None, ends: bool = False) -> Joined:
        """Let `holder` run in the unit of work of `entry`, which releases it and, unless `ends`, ends it."""
        joined = Joined(entry.unit, kind, holder, request, ends=ends)
        joined.registry, joined.scope = self, here()
        stack = joined.scope.units
        joined.in_task = kind in TASK_KINDS or bool(stack and stack[-1].in_task)
        stack.append(joined)
        return joined

    @shield.covers
    def leave(self, entry: Entry, error: BaseException | None = None) -> None:
        """Take `entry` off the stack and, where it owns its unit of work, release that."""
        if entry.left:
            return  # an abandoned block's generator is closed by the garbage collector, long after `end_abandoned`
        entry.left = True
        if not isinstance(entry, UnitOfWork):
            take_off(entry)
            return
        try:
            if entry.opened is not None or entry.has_parts:
                entry.close()
        finally:
            stack = entry.scope.units
            if stack and stack[-1] is entry:
                stack.pop()
            else:
                take_off(entry)
            self.ended += 1
            duration_s = monotonic() - entry.began
            if duration_s > self.longest_s:
                self.longest_s, self.longest = duration_s, entry.titled
            if entry.scope.held and entry.outermost and entry.kind in TASK_KINDS:
                self._take_back(entry)
            if error is not None or entry.has_parts:
                entry.after_end(error)
            if entry.strategy.follows_units:
                entry.strategy.leave(entry)
            if entry.options.hooks:
                for hook in entry.options.hooks:
                    hook.ended(entry)

    @shield.covers
    def _take_back(self, unit: UnitOfWork) -> None:
        """Give back what the code of a task request has checked out, and kept: no other code ever will, and the
        connection pool would lose a slot for each."""
        for record in [record for record in unit.scope.held if record not in unit.held]:
            holding = holding_of(record)
            origin = describe(holding.origin if holding is not None else None)
            if take_back([record]):
                self.leaks += 1
                unit.leaked += 1
                logger.warning(
                    "%s has ended, and a connection is still checked out. It is taken back and closed. It was checked "
                    "out at %s: close it there, or use `with`.",
                    unit.label, origin,
                )  # fmt: skip

    def end_abandoned(self) -> None:
        """End what an interruption between two bytecodes left on the stack of this thread or greenlet: a request that
        the worker has just begun is inside nothing."""
        for entry in reversed(list(open_entries())):
            logger.warning("%s was interrupted before it could be ended; it is rolled back now", entry.unit.label)
            entry.registry.leave(entry)

    def open(self, label: Label, *, commits: bool, kind: str, read_only: Any = False) -> Block:
        """Return a block that is a unit of work of its own, ended with the block: committed, or rolled back when it
        raises."""
        return Block(self, self.block_options(commits, read_only), label, kind)

    def block_options(self, commits: bool, read_only: Any) -> UnitOptions:
        """Return how blocks are treated; made once for each kind."""
        key = (commits, read_only)
        options = self._made_options.get(key)
        if options is None:
            options = self._made_options[key] = self._options(commits=commits, read_only=read_only)
        return options

    def use(self, strategy: SessionStrategy | None, unit_class: type[UnitOfWork]) -> None:
        """Open units of work with `strategy` from now on; None: it is to be chosen again."""
        self.strategy, self.unit_class = strategy, unit_class
        self._made_options.clear()

    def run_callback(self, callback: Callback) -> None:
        """Run an `on_commit` callable in a unit of work of its own; one that says so needs none, which costs less."""
        units = getattr(current_scope(), SCOPE).units if not getattr(callback, "needs_unit", True) else None
        if units and units[-1].coroutine is None:
            unit = units[-1].unit
            is_over = unit.opened is None
            callback()
            if is_over and unit.opened is not None:  # a router of the user's, say, has used the database
                unit.end_well()
                unit.close()
            return
        named = getattr(callback, "func", callback)  # of a partial; its arguments are not for a log
        label = f"on_commit callback {getattr(named, '__qualname__', type(named).__name__)}"
        unit = self.begin(self.block_options(True, False), label, "callback")
        error: BaseException | None = None
        try:
            callback()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.finish(unit, error)

    @shield.covers
    def finish(self, unit: UnitOfWork, error: BaseException | None) -> None:
        """End `unit`, whose block has returned or raised `error`, and release it."""
        try:
            if error is not None:
                unit.fail(error)
            else:
                try:
                    unit.succeed(final=True)
                except BaseException as failure:
                    error = failure
                    raise
        finally:
            self.leave(unit, error)
            error = None  # no cycle: exception -> traceback -> this frame -> exception
        if shield.pending is not None:
            shield.check_later()


class Block(ContextDecorator, AbstractContextManager[Session]):
    """A block of code that is a unit of work: its Session is what `with` gives."""

    def __init__(self, registry: UnitOfWorkRegistry, options: UnitOptions, label: Label, kind: str) -> None:
        self._registry, self._options, self._label, self._kind = registry, options, label, kind
        self._open: list[UnitOfWork] = []

    @shield.covers
    def __enter__(self) -> Session:
        top = innermost_entry()
        if top is not None and not is_here(top.coroutine) and not is_strange(top.coroutine):
            raise CeleryAlchemyError(_taking_turns(f"{written(self._label)} would be opened", top))
        refuse_to_block(written(self._label), self._registry.started())
        unit = self._registry.begin(self._options, self._label, self._kind)
        unit.coroutine = enter()
        try:
            session = unit.session
        except BaseException as error:
            self._end(unit, error)
            raise
        self._open.append(unit)
        return session

    @shield.covers
    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._end(self._open.pop(), error)

    def _end(self, unit: UnitOfWork, error: BaseException | None) -> None:
        """End `unit` here: it may have been opened in another thread, or context."""
        come_back(unit.coroutine)
        move_here(unit)
        try:
            self._registry.finish(unit, error)
        finally:
            leave_place(unit.coroutine)


def _taking_turns(what: str, entry: Entry) -> str:
    return (
        f"{what} inside {entry.unit.label}, which another coroutine of this thread has open. Sessions are not for "
        f"coroutines that take turns: do not await inside the block, or run it in a thread (asyncio.to_thread)."
    )


def no_unit_of_work(what: str) -> NoUnitOfWork:
    """Return the error for `what`, used where no unit of work is open."""
    return NoUnitOfWork(
        f"{what} was used in {describe_current_scope()}, where no unit of work is open. In a script, a shell or a web "
        f"request, write `with db.unit_of_work() as session:` around what is to be one transaction. It commits at its "
        f"end. In a thread or greenlet that a task has started, write the same there: it has no unit of work of its "
        f"own, and the Session of the task must not be shared."
    )
