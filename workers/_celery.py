"""Everything private of Celery that cannot be avoided, in one place.

Tried on Celery 5.5.0, 5.6 and 5.7.0. Each function says what breaks without it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery._state import _task_stack
from celery.app import base


def running_request() -> Any:
    """Return the request that this thread runs; None where it runs none.

    `celery.current_task` is a proxy whose `request` outside of a task is a shared default object.
    """
    task = _task_stack.top
    return task.request_stack.top if task is not None else None


#: Returns what the stack of requests of a task keeps for each thread or greenlet. `task.request_stack.top` finds the
#: request too, through an attribute that is missing, and each task would pay 7,000 instructions for it. Raises
#: AttributeError where the environment variable USE_FAST_LOCALS is set.
requests_of = operator.attrgetter("request_stack._local")


def is_spawned() -> bool:
    """Tell whether this process is a pool process that was started as a fresh interpreter: it gets another app object,
    and no `worker_init`."""
    return bool(base.USING_EXECV)


def known_task(app: Celery, name: str) -> Any:
    """Return the task `name` of `app` where it is there already; `app.tasks` would finalise the app."""
    return app._tasks.get(name)


def pydantic_dump(cls: Any) -> Callable[..., Any] | None:
    """Return what turns the pydantic models among a caller's arguments into data; None for a task that has none.

    Celery 5.7 binds the arguments to all parameters first, and would miss one that is injected.
    """
    found: Callable[..., Any] | None = cls.__dict__.get("_dump_pydantic_arguments")
    return found


def set_pydantic_dump(cls: Any, dump: Callable[..., Any]) -> None:
    """Replace what `pydantic_dump` returns."""
    cls._dump_pydantic_arguments = staticmethod(dump)
