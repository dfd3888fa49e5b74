"""A task that uses what only a DatabaseTask has, and is none: its failure is explained in the log."""

from __future__ import annotations

import logging
from typing import Any

from celery import Task

from . import apps
from .wrapping import is_database_task

logger: logging.Logger = logging.getLogger(__name__)

#: What a task is asked for by code that takes it for a DatabaseTask.
_NAMES = frozenset({"db", "session_for", "delay_on_commit", "apply_async_on_commit"})
#: What a task of another class is sent with.
_OTHERWISE = {
    "delay_on_commit": "; or send it with db.delay_on_commit(task, ...)",
    "apply_async_on_commit": "; or send it with db.apply_async_on_commit(task, args, kwargs)",
}


def explain_failure(sender: Any = None, exception: BaseException | None = None, **_: Any) -> None:
    """Log what to change, where a task failed because some task of an app of ours is no DatabaseTask.

    A receiver of Celery's signal `task_failure`: nothing is asked while tasks go well.
    """
    if not isinstance(exception, AttributeError) or exception.name not in _NAMES:
        return
    lacking = exception.obj
    if not isinstance(lacking, Task) or is_database_task(lacking) or apps.find(lacking.app) is None:
        return
    logger.error(
        "The task %s is no DatabaseTask, so it has no %r%s. Give it a base: `@app.task(base=DatabaseTask)`, or derive "
        "its class from DatabaseTask%s.", lacking.name, exception.name,
        "" if sender is None or lacking.name == sender.name else f", which the task {sender.name} has used",
        _OTHERWISE.get(exception.name, ""),
    )  # fmt: skip
