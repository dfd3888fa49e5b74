"""Puts into an app what lets its messages wait for a COMMIT: its `send_task`, and the task classes that it makes."""

from __future__ import annotations

from typing import Any

from celery import Celery

from .._celery import watch_tasks
from . import enqueue
from .calls import defer_overrides
from .celerys_own import mark_methods

_WATCHED = "_celery_alchemy_tasks"


def attach(app: Celery) -> None:
    """Let the messages of `app` wait for a COMMIT where they are to, once."""
    enqueue.attach(app)
    if _WATCHED not in app.__dict__:
        app.__dict__[_WATCHED] = True
        watch_tasks(app, _adopt)


def _adopt(task: Any) -> None:
    """Treat the class of any task as DatabaseTask treats its own: what it sends in a block is no different."""
    cls = type(task)
    defer_overrides(cls)
    mark_methods(cls)
