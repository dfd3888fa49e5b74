"""Ordinary units of work in coroutines: each statement would stop the event loop."""

from __future__ import annotations

import sys

from .base import SessionStrategy
from .drivers.green import is_patched
from .errors import CeleryAlchemyError
from .interrupts import current_interruption
from .place import current_coroutine
from .scope import runs_in_greenlet


def refuse_to_block(what: str, strategy: SessionStrategy) -> None:
    """Refuse `what`, an ordinary unit of work, in a coroutine whose event loop its statements would stop.

    Allowed are: a thread that a coroutine has started; a driver that can only be awaited, in the coroutine of a task
    itself, where statements are awaited; what Celery calls around an `async def` body, such as a handler of the signal
    task_postrun, which cannot await; a test in one transaction; a process that gevent or eventlet has patched,
    where statements let other greenlets run, and the event loop that is seen may be another greenlet's.

    Raises:
        CeleryAlchemyError: says what to write.
    """
    if current_coroutine() is None or strategy.shares_connection or (strategy.awaits and runs_in_greenlet()):
        return
    request = current_interruption.get()
    if request is not None and not request.in_body:
        return
    if any(library in sys.modules and is_patched(library) for library in ("gevent", "eventlet")):
        return
    raise CeleryAlchemyError(
        f"{what} would be opened in a coroutine, and each of its statements would stop the event loop. Write `async "
        f"with db.async_unit_of_work() as session:`, and await what the AsyncSession does; or run the function that "
        f"has `with db.unit_of_work():` in a thread: `await asyncio.to_thread(function)`."
    )
