"""Units of work of coroutines.

The unit of work is that of ordinary code: it begins and ends in a greenlet, where a COMMIT awaits. Where no greenlet
hosts the coroutine (a child of a task's, a script), one is made for its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.util import concurrency

from ..base import SessionStrategy
from ..entry import Label, UnitOptions, move_here
from ..features.on_event_loop import is_coroutine_function
from ..on_commit import Callback
from ..registry import UnitOfWorkRegistry
from ..scope import here, own_scope, runs_in_greenlet
from ..several.several_units import Part, SeveralUnits
from ..unit_of_work import UnitOfWork
from .hosting import check_later, held, host

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

Result = TypeVar("Result")


class AwaitingUnit(UnitOfWork):
    """A unit of work of one coroutine; mixed in before the class that ends it."""

    awaits = True
    task: asyncio.Task[Any] | None = None
    """The asyncio task that its Session belongs to."""
    _async_session: AsyncSession | None = None

    @property
    def async_session(self) -> AsyncSession:
        """Its AsyncSession, around its Session; opened on first use."""
        from .sessions import around

        session = self.session
        found = self._async_session
        if found is None or found.sync_session is not session:
            found = self._async_session = around(session)
        return found

    def end_well(self) -> None:
        try:
            self.prepare()
        except BaseException as error:
            self.fail_alone(error)
            raise
        with held():
            super().end_well()

    def close(self) -> None:
        super().close()
        self._async_session = None  # no cycle: it knows its Session, which knows this


class AsyncUnitOfWork(AwaitingUnit):
    """What one coroutine does in the database."""


class AsyncPart(AwaitingUnit, Part):
    """What it does in another one."""


class AsyncSeveralUnits(AwaitingUnit, SeveralUnits):
    """What one coroutine does in several databases."""

    part_class: type[Part] = AsyncPart

    def part_of(self, registry: Any, strategy: Callable[[], SessionStrategy], position: int) -> UnitOfWork:
        there = registry.twin or registry  # the Sessions of a coroutine are all its own kind
        part: Any = super().part_of(there, there.started, position)
        part.task = self.task
        return part  # type: ignore[no-any-return]

    def succeed(self, *, final: bool) -> None:
        with held():  # between two COMMITs too
            super().succeed(final=final)


class AsyncUnits(UnitOfWorkRegistry):
    """Opens the units of work of coroutines on one database.

    Args:
        twin_of: The registry of ordinary code, which finds them too.
    """

    unit_class: type[UnitOfWork] = AsyncUnitOfWork

    def __init__(
        self, start: Callable[[], object], options: Callable[..., UnitOptions], twin_of: UnitOfWorkRegistry
    ) -> None:
        super().__init__(start, options)
        self.twin_of: UnitOfWorkRegistry | None = twin_of
        twin_of.twin = self

    def begin(
        self, options: UnitOptions, label: Label, kind: str, holder: object = None, request: object = None
    ) -> UnitOfWork:
        """Open a unit of work of its own; no Session yet."""
        unit: Any = super().begin(options, label, kind, holder, request)
        hosts = unit.scope.hosts
        unit.task = hosts.task if hosts is not None else asyncio.current_task()
        return unit  # type: ignore[no-any-return]

    def run_callback(self, callback: Callback) -> None:
        """Run an `on_commit` callable, one that is `async def` too."""
        here()  # a greenlet that an AsyncSession has made for this COMMIT has not asked yet
        super().run_callback(_Awaiting(callback) if is_coroutine_function(callback) else callback)

    def open_async(
        self, label: Label, *, options: UnitOptions, kind: str, holder: object = None, request: object = None
    ) -> AsyncBlock:
        """Return a block of a coroutine that is a unit of work of its own."""
        return AsyncBlock(self, options, label, kind, holder, request)


class _Awaiting:
    """An `async def` callback, called in a greenlet."""

    def __init__(self, func: Any) -> None:
        self.func = func

    def __call__(self) -> object:
        return host(self.func())


async def in_greenlet(function: Callable[[], Result]) -> Result:
    """Call `function` where it can await: here, in a greenlet that hosts the coroutine, or in one made for it."""
    return function() if runs_in_greenlet() else await concurrency.greenlet_spawn(function)


class AsyncBlock(AbstractAsyncContextManager["AsyncSession"]):
    """A block of a coroutine that is a unit of work: its AsyncSession is what `async with` gives."""

    def __init__(
        self,
        registry: AsyncUnits,
        options: UnitOptions,
        label: Label,
        kind: str,
        holder: object = None,
        request: object = None,
    ) -> None:
        self._registry = registry
        self._how = (options, label, kind, holder, request)
        self._open: list[AwaitingUnit] = []

    async def __aenter__(self) -> AsyncSession:
        import sqlalchemy.ext.asyncio  # noqa: F401 - by which a greenlet knows that it may await

        self._registry.started()
        own_scope()
        unit: Any = self._registry.begin(*self._how)
        try:
            session: AsyncSession = unit.async_session
        except BaseException as error:
            await self._end(unit, error)
            raise
        self._open.append(unit)
        return session

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self._end(self._open.pop(), error)

    async def _end(self, unit: AwaitingUnit, error: BaseException | None) -> None:
        """End `unit` here: it may have been opened in another asyncio task."""
        own_scope()
        move_here(unit)
        unit.task = asyncio.current_task()
        await in_greenlet(lambda: self._registry.finish(unit, error))
        if error is None:
            check_later()  # a time limit has waited for the COMMIT
