"""Why there is no Session here, as far as the task tells that runs."""

from __future__ import annotations

from ..strategies.errors import NoUnitOfWork
from ..strategies.registry import no_unit_of_work
from ._celery import running_task
from .wrapping import is_database_task


def no_unit_here(what: str) -> NoUnitOfWork:
    """Return the error for `what`, used where no unit of work is open: a plain task, a signal handler, a thread."""
    task = running_task()
    if task is None:
        return no_unit_of_work(what)
    if not is_database_task(task):
        return NoUnitOfWork(
            f"{what} was used in the task {task.name}, which is no DatabaseTask and has no unit of work. Give it "
            f"`base=DatabaseTask`, or open a unit of work: `with db.unit_of_work() as session:`."
        )
    return NoUnitOfWork(
        f"{what} was used around the task {task.name}, not in it: its unit of work is not open yet, or over (a signal "
        f"handler, another app's Alchemy). Open one there: `with db.unit_of_work() as session:`."
    )
