"""The AsyncSession of the unit of work that runs, or why there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..strategies.errors import CeleryAlchemyError, NoUnitOfWork
from ..strategies.place import current_coroutine
from .no_unit import no_unit_here

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


def async_session_of(db: Any, what: str, task: Any = None) -> AsyncSession:
    """Return the AsyncSession of the unit of work that runs here, on the database of `db`.

    Args:
        what: How it was asked for.
        task: Whose it is to be, where a task asks for its own.
    """
    registry = db.units
    entry = (registry.entry_of(task) if task is not None else None) or registry.current_entry()
    if entry is None:
        raise _no_unit(what)
    unit: Any = registry.unit_of(entry)
    if not unit.awaits:
        raise CeleryAlchemyError(
            f"{what} was used in {unit.label}, whose Session is an ordinary one: use `db.session` there, or make the "
            f"task an AsyncDatabaseTask, or open `async with db.async_unit_of_work() as session:`."
        )
    session: AsyncSession = unit.async_session
    return session


def _no_unit(what: str) -> NoUnitOfWork:
    if current_coroutine() is None:
        return no_unit_here(what)
    return NoUnitOfWork(
        f"{what} was used in a coroutine without a unit of work of its own: asyncio.gather(), a TaskGroup or "
        f"create_task() has started it, or it is none of a task's. The Session of a task is not for two coroutines at "
        f"a time. In this one, write `async with db.async_unit_of_work() as session:`."
    )
