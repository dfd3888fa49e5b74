"""The worker's side of the measurement: announce the worker, answer for each task.

Signals, not task hooks: they reach every way to define a task, and nothing here goes near `self.db`, so that
reporting never opens a connection of its own.

A user's own worker is measured with `celery -A proj worker -I celery_alchemy.loadtests.reporting`, and the variable
LOADTEST_REPLY_URL: it then answers for every task that carries the header `loadtest_reply`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Task
from celery.signals import task_failure, task_prerun, task_retry, task_success, worker_init, worker_ready

from celery_alchemy.workers import apps
from celery_alchemy.workers.starting import detection

from .tasks import phases
from .tasks.patterns import Pattern
from .tasks.replies import Outcome, Reply, ReplyList

_LIMIT = getattr(signal, "SIGUSR1", None)
ERROR_LENGTH = 300
REPLY_URL, READY_KEY = "LOADTEST_REPLY_URL", "LOADTEST_READY_KEY"
"""What a user's worker is told: the redis-py URL of the reply lists, and the list on which it announces itself."""


def connect(
    reply_url: str, ready_key: str | None, reply_key: str | None = None, pattern: Pattern | None = None
) -> None:
    """Report readiness, and every ended attempt of a task.

    Args:
        reply_key: The list for replies to tasks without the header `loadtest_reply`; None: they get none.
        pattern: How tasks get their Session, if it is known and not ours.
    """
    replies = Replies(reply_url, reply_key)

    def instrument(sender: Any, **_: Any) -> None:
        if db := apps.find(sender.app):
            db.on_engine(phases.instrument)  # before pool processes are forked

    def ready(sender: Any, **_: Any) -> None:
        if ready_key:
            announce(reply_url, ready_key, **_described(sender, pattern))

    def started(task: Task, **_: Any) -> None:
        task.request.loadtest = phases.begin()

    def succeeded(sender: Task, **_: Any) -> None:
        replies.answer(sender.request, sender.request.id, Outcome.SUCCESS)

    def failed(sender: Task, task_id: str, exception: BaseException, **_: Any) -> None:
        # Also where the parent of a lost pool process tells of it.
        replies.answer(sender.request, task_id, Outcome.FAILURE, exception)

    def retried(request: Any, reason: Any, **_: Any) -> None:
        replies.answer(request, request.id, Outcome.RETRY, reason if isinstance(reason, BaseException) else None)

    receivers: dict[Any, Any] = {
        worker_init: instrument, worker_ready: ready, task_prerun: started,
        task_success: succeeded, task_failure: failed, task_retry: retried,
    }  # fmt: skip
    for sent, receiver in receivers.items():
        sent.connect(receiver, weak=False)


def announce(reply_url: str, ready_key: str, **described: Any) -> None:
    """Tell that a worker consumes; `described` are fields of `harness.Worker`."""
    with contextlib.closing(ReplyList(reply_url, ready_key)) as ready:
        ready.push(json.dumps({"pid": os.getpid(), "strategy": "", "reason": "", **described}))


def _described(consumer: Any, pattern: Pattern | None) -> dict[str, Any]:
    if db := apps.find(consumer.app):
        # Which of the two it has, its tasks decide; the ordinary one announces all connections.
        used = db.strategy
        return {"strategy": used.name, "reason": used.reason, "max_connections": used.max_connections}
    if pattern is None:
        return {"max_connections": None}
    worker_pool = detection.detect(consumer.controller)
    return {"max_connections": pattern.connections(worker_pool.tasks_per_process) * worker_pool.process_count}


class Replies:
    """Answers for attempts of tasks."""

    def __init__(self, reply_url: str, reply_key: str | None) -> None:
        self._reply_key, self._replies = reply_key, ReplyList(reply_url, reply_key or "")

    def answer(self, request: Any, task_id: str, outcome: Outcome, error: BaseException | None = None) -> None:
        """Push the reply to one ended attempt."""
        ended = time.monotonic()
        # The parent of a lost pool process never saw the start.
        measurement = getattr(request, "loadtest", None)
        known: phases.Measurement = measurement or phases.Measurement()
        key = getattr(request, "loadtest_reply", None) or self._reply_key
        if key is None:
            return
        reply = Reply(
            task_id=task_id,
            outcome=outcome,
            started=known.started if measurement else ended,
            ended=ended,
            pid=os.getpid(),
            checked_out=phases.checked_out(),
            error_type=type(error).__name__ if error else None,
            error=" ".join(str(error).split())[:ERROR_LENGTH] if error else None,
            checkout_ms=round(known.checkout_s * 1000, 4),
            database_ms=round(known.database_s * 1000, 4),
            breach=known.breach,
            attempt=(getattr(request, "retries", 0) or 0) + 1,
        )
        with _undisturbed():
            self._replies.push(reply.to_json(), key)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep prefork's soft time limit away: it would silence the witness of a task that has ended."""
    if _LIMIT is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(_LIMIT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(_LIMIT, handler)


if os.environ.get(REPLY_URL):  # Loaded into a user's worker, by its -I; our own app calls `connect` itself.
    connect(os.environ[REPLY_URL], os.environ.get(READY_KEY))
