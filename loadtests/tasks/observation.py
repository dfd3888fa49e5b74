"""Run a workload in a task of any pattern, and see whether the Session it was given is its own.

The same few microseconds for every pattern. What is found is recorded, not raised: the task goes on as it would.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import Celery, Task
from sqlalchemy.orm import Session, scoped_session

from ..faults.tasks import FAULT_TASKS
from . import phases
from .patterns import AnySession, Built
from .workloads import FAN_OUT_COLLECT, FAN_OUT_PART, TASKS, WORKLOADS, Call, TransferRefused, Workload

FAN_OUT = WORKLOADS["fan_out"]
_running: dict[int, Session] = {}  # The Sessions of the attempts that run in this process now


def register(app: Celery, built: Built) -> None:
    """Define the task of every workload, with the same options whatever the pattern."""
    for workload in (*TASKS, *FAULT_TASKS):
        options: dict[str, Any] = {"throws": (TransferRefused,), "ignore_result": not workload.keeps_result}
        if workload.retried_on:
            options |= {"autoretry_for": workload.retried_on, "default_retry_delay": 0.1, "max_retries": 300}
        app.task(bind=True, base=built.base, name=workload.task_name, **options)(_task_of(workload, built))


def _task_of(workload: Workload, built: Built) -> Any:
    def task(self: Task, *args: Any, **kwargs: Any) -> Any:
        return built.attempt(self, partial(run, workload, self, args, kwargs))

    return task


def run(
    workload: Workload, task: Task[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], session: AnySession
) -> Any:
    """Run `workload` in `session`, for one attempt of `task` that was sent with `args` and `kwargs`."""
    own = session_behind(session)
    measurement = phases.current()
    measurement.breach = breach_of(own)
    call = _call(workload, task, measurement, args, **kwargs)
    key = id(call)
    _running[key] = own
    try:
        result = workload.body(session, call)  # type: ignore[arg-type]
    finally:
        del _running[key]
    # A part does not answer for itself: the task that collects tells what was wrong with it.
    return [result, measurement.breach] if workload.keeps_result else None


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


def _call(
    workload: Workload, task: Task[..., Any], measurement: phases.Measurement, args: tuple[Any, ...], *,
    root_id: str = "", root_started: float = 0.0, root_breach: str = "", part: int = 0,
) -> Call:  # fmt: skip
    request = task.request
    measurement.partial = workload in (FAN_OUT, FAN_OUT_PART)
    if not root_id:
        measurement.task_id = request.id
        return Call(request.id, args[0], request.retries, task)
    measurement.task_id, measurement.started = root_id, root_started
    results: tuple[Any, ...] = ()
    if workload is FAN_OUT_COLLECT:
        collected, *args = args  # type: ignore[assignment]
        results = tuple(result for result, _ in collected)
        breaches = [root_breach, *(breach for _, breach in collected), measurement.breach]
        measurement.breach = next(filter(None, breaches), "")
    return Call(root_id, args[0], request.retries, task, part, results)
