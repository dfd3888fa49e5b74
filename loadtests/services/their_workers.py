"""A user's own app and its running workers: what can be asked of them, and be undone afterwards."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.app.utils import find_app as celery_find_app
from celery.utils.imports import cwd_in_path

from ..errors import LoadTestError

REPLY_S = 3.0


class AppError(LoadTestError):
    """The app cannot be imported, or its workers do not answer as they should."""


def find_app(name: str) -> Any:
    """Return the Celery app, as `celery -A` finds it.

    Raises:
        AppError: There is none of this name.
    """
    with cwd_in_path():
        try:
            app = celery_find_app(name)
        except Exception as error:
            # It runs the user's module.
            raise AppError(f"--app: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(app, Celery):
        raise AppError(f"--app: {name!r} is not a Celery app but a {type(app).__name__}.")
    return app


def require_task(app: Any, name: str, task: str) -> None:
    """Ask the running workers for a task.

    Raises:
        AppError: No worker answers, or none knows the task.
    """
    try:
        answers: dict[str, list[str]] = app.control.inspect(timeout=REPLY_S).registered() or {}
    except OSError as error:
        raise AppError(f"The broker of {name} cannot be reached: {error}") from error
    if not answers:
        raise AppError(
            f"No worker of {name} answered within {REPLY_S:g} s: start one with `celery -A {name} worker`, "
            "with worker_enable_remote_control left on."
        )
    known = {entry.split()[0] for entries in answers.values() for entry in entries}
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"It knows: {', '.join(sorted(known))}."
        raise AppError(f"--task: no worker of {name} knows {task!r}. {hint}")


@contextmanager
def task_events(app: Any) -> Iterator[list[str]]:
    """Have the running workers send task events during the block; yield those that did not before."""
    answers: list[dict[str, dict[str, str]]] = app.control.enable_events(reply=True, timeout=REPLY_S) or []
    told = {worker: reply.get("ok") for answer in answers for worker, reply in answer.items()}
    # A worker that sends them anyway answers "task events already enabled".
    switched = [worker for worker, reply in told.items() if reply == "task events enabled"]
    try:
        yield switched
    finally:
        if switched:
            with contextlib.suppress(OSError):
                app.control.disable_events(destination=switched, reply=True, timeout=REPLY_S)
