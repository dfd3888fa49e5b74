"""Run a workload in a task of any pattern, and see whether the Session it was given is its own.

The same few microseconds for every pattern. What is found is recorded, not raised: the task goes on as it would.
"""

from __future__ import annotations

from functools import partial
from inspect import iscoroutinefunction
from typing import Any

from celery import Celery, Task
from sqlalchemy.orm import Session, scoped_session

from ..faults.tasks import FAULT_TASKS
from . import phases
from .patterns import AnySession, Built
from .workloads import NOTHING, TASKS, Call, TransferRefused, Workload

_running: dict[int, Session] = {}  # The Sessions of the attempts that run in this process now


def register(app: Celery, built: Built) -> None:
    """Define the task of every workload, with the same options whatever the pattern."""
    for workload in (*TASKS, *FAULT_TASKS):
        options: dict[str, Any] = {"throws": (TransferRefused,), "ignore_result": True}
        if workload.retried_on:
            options |= {"autoretry_for": workload.retried_on, "default_retry_delay": 0.1, "max_retries": 300}
        if workload.once:
            options |= built.once
        app.task(bind=True, base=built.base, name=workload.task_name, **options)(_task_of(workload, built))


def _task_of(workload: Workload, built: Built) -> Any:
    def task(self: Task, number: int) -> Any:
        # Not even a Session is opened: what is left is what Celery and the worker pool cost.
        return None if workload is NOTHING else built.attempt(self, partial(run, workload, self, self.request, number))

    async def awaiting(self: Task, number: int) -> None:
        if workload is not NOTHING:
            await task(self, number)

    return awaiting if iscoroutinefunction(built.attempt) else task


def run(workload: Workload, task: Any, request: Any, number: int, session: AnySession) -> None:
    """Run `workload` in `session`, for one attempt of `task` that was sent with a number.

    Args:
        request: The attempt's; `task.request` is none in a greenlet of an AsyncSession that somebody else has made.
    """
    own, call = session_behind(session), Call(request.id, number, request.retries, task)
    phases.current().breach = breach_of(own)
    key = id(call)
    _running[key] = own
    try:
        workload.body(session, call)  # type: ignore[arg-type]
    finally:
        del _running[key]


def session_behind(session: AnySession) -> Session:
    """Return the Session itself, if `session` is a proxy."""
    return session.registry() if isinstance(session, scoped_session) else session


def breach_of(session: Session) -> str:
    """Return what is wrong with a Session that a task gets; empty if it is fresh, and no other task's."""
    if any(other is session for other in list(_running.values())):
        return "its Session is in use by another task"
    transaction = session.get_transaction()
    # `with session.begin()` has begun already, but has no connection yet.
    if transaction is not None and transaction._connections:
        return "its Session was in a transaction already"
    if session.new or session.deleted:
        return "its Session held objects of another task, yet to be written"
    if any(not state.expired for state in session.identity_map.all_states()):
        return "its Session held objects that another task had read"
    return ""
