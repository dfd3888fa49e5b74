"""The worker's side of the measurement: announce the worker, answer for each task.

Signals, not task hooks: they reach every way to define a task, and nothing here goes near `self.db`, so that
reporting never opens a connection of its own.

A user's own worker is measured with `celery -A proj worker -I celery_alchemy.loadtests.reporting`, and the variable
LOADTEST_REPLY_URL: it then answers for every task that carries the header `loadtest_reply`.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery, Task
from celery.signals import task_failure, task_prerun, task_retry, task_success, worker_init, worker_ready

from celery_alchemy.workers import apps
from celery_alchemy.workers.starting import detection

from . import phases
from .patterns import Pattern
from .replies import Outcome, Reply, ReplyList

_LIMIT = getattr(signal, "SIGUSR1", None)
ERROR_LENGTH = 300
REPLY_URL, READY_KEY, QUEUE = "LOADTEST_REPLY_URL", "LOADTEST_READY_KEY", "LOADTEST_QUEUE"


def user_environ(reply_url: str, ready_key: str) -> dict[str, str]:
    """Return the variables that a user's worker with `-I celery_alchemy.loadtests.reporting` needs.

    Args:
        reply_url: redis-py URL of the server with the reply lists.
        ready_key: The list on which the worker announces itself, once it consumes.
    """
    return {REPLY_URL: reply_url, READY_KEY: ready_key}


def connect(
    reply_url: str, ready_key: str | None, reply_key: str | None = None, pattern: Pattern | None = None
) -> None:
    """Report readiness, and every ended attempt of a task.

    Args:
        reply_key: The list for replies to tasks without the header `loadtest_reply`; None: they get none.
        pattern: How tasks get their Session, if it is known and not ours.
    """
    reporter = Reporter(reply_url, ready_key, reply_key, pattern)
    for sent, receiver in (
        (worker_init, reporter.instrument),
        (worker_ready, reporter.announce),
        (task_prerun, reporter.started),
        (task_success, reporter.succeeded),
        (task_failure, reporter.failed),
        (task_retry, reporter.retried),
    ):
        sent.connect(receiver, weak=False)


class Reporter:
    """The receivers of the signals."""

    def __init__(self, reply_url: str, ready_key: str | None, reply_key: str | None, pattern: Pattern | None) -> None:
        self._reply_url, self._ready_key, self._reply_key = reply_url, ready_key, reply_key
        self._pattern = pattern
        self._replies = ReplyList(reply_url, reply_key or "")

    def instrument(self, sender: Any, **_: Any) -> None:
        """Measure the Engines of the app's Alchemy: before pool processes are forked."""
        db = apps.find(sender.app)
        if db is not None:
            db.on_engine(phases.instrument)

    def announce(self, sender: Any, **_: Any) -> None:
        """Tell that the worker consumes, and what it is, if somebody waits for that."""
        if not self._ready_key:
            return
        ready = ReplyList(self._reply_url, self._ready_key)
        ready.push(json.dumps({"pid": os.getpid(), **self._described(sender.app, sender.controller)}))
        ready.close()

    def started(self, task: Task, **_: Any) -> None:
        """Begin to measure an attempt."""
        task.request.loadtest = phases.begin()

    def succeeded(self, sender: Task, **_: Any) -> None:
        """Answer for a task that returned."""
        self._answer(sender.request, sender.request.id, Outcome.SUCCESS)

    def failed(self, sender: Task, task_id: str, exception: BaseException, **_: Any) -> None:
        """Answer for a task that failed; also where the parent of a lost pool process does so in its stead."""
        self._answer(sender.request, task_id, Outcome.FAILURE, exception)

    def retried(self, sender: Task, request: Any, reason: Any, **_: Any) -> None:
        """Answer for an attempt that is not the last."""
        self._answer(request, request.id, Outcome.RETRY, reason if isinstance(reason, BaseException) else None)

    def _answer(self, request: Any, task_id: str, outcome: Outcome, error: BaseException | None = None) -> None:
        ended = time.monotonic()
        # The parent of a lost pool process never saw the start.
        measurement = getattr(request, "loadtest", None)
        known: phases.Measurement = measurement or phases.Measurement()
        key = getattr(request, "loadtest_reply", None) or self._reply_key
        if key is None or (known.partial and outcome is Outcome.SUCCESS):
            return
        reply = Reply(
            task_id=known.task_id or task_id,
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
        # Of a fan-out several parts can fail; whoever waits for its end wants to hear of it once.
        shared = known.partial or reply.task_id != task_id
        with _undisturbed():
            self._replies.push(reply.to_json(), key, once_for=reply.task_id if shared else None)

    def _described(self, app: Celery, worker: Any) -> dict[str, Any]:
        db = apps.find(app)
        if db is not None:
            strategy = db.strategy
            return {
                "strategy": strategy.name,
                "reason": strategy.reason,
                "max_connections": strategy.max_connections,
            }
        return {"strategy": "", "reason": "", "max_connections": self._promised(detection.detect(worker))}

    def _promised(self, worker_pool: Any) -> int | None:
        if self._pattern is None:
            return None
        # Without a connection pool the server can still be ending a connection when the task's next one is there.
        per_process = self._pattern.connections_per_process or 2 * worker_pool.tasks_per_process
        return int(per_process * worker_pool.process_count)


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


if os.environ.get(REPLY_URL) and not os.environ.get(QUEUE):
    # Loaded into a user's worker, by its -I. Our own app has a queue in its environment, and calls `connect` itself.
    connect(os.environ[REPLY_URL], os.environ.get(READY_KEY))
