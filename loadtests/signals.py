"""The worker's side of the measurement: announce the worker, answer for each task.

Signals, not task hooks: they reach every way to define a task, and nothing here goes near `self.db`, so that
reporting never opens a connection of its own.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery import Task
from celery.signals import task_failure, task_prerun, task_retry, task_success, worker_ready

from celery_alchemy import Alchemy

from .environment import WorkerEnvironment
from .replies import Outcome, Reply, ReplyList

ERROR_LENGTH = 300


def connect(db: Alchemy, environment: WorkerEnvironment) -> None:
    """Report readiness and every ended attempt of a task to the broker."""
    replies = ReplyList(environment.reply_url, environment.reply_key)

    def announce(**_: Any) -> None:
        strategy = db.strategy
        ready = ReplyList(environment.reply_url, environment.ready_key)
        ready.push(
            json.dumps(
                {
                    "pid": os.getpid(),
                    "strategy": strategy.name,
                    "reason": strategy.reason,
                    "max_connections": strategy.max_connections,
                }
            )
        )
        ready.close()

    def stamp(task: Task, **_: Any) -> None:
        task.request.loadtest_started = time.monotonic()

    def answer(task: Task, request: Any, outcome: Outcome, error: BaseException | None = None) -> None:
        ended = time.monotonic()
        reply = Reply(
            task_id=request.id,
            outcome=outcome,
            # The parent of a lost pool process answers in its stead, and never saw the start.
            started=getattr(request, "loadtest_started", None) or ended,
            ended=ended,
            pid=os.getpid(),
            checked_out=checked_out(db),
            error_type=type(error).__name__ if error else None,
            error=" ".join(str(error).split())[:ERROR_LENGTH] if error else None,
        )
        replies.push(reply.to_json())

    def succeeded(sender: Task, **_: Any) -> None:
        answer(sender, sender.request, Outcome.SUCCESS)

    def failed(sender: Task, task_id: str, exception: BaseException, **_: Any) -> None:
        request = sender.request if sender.request.id else _Unseen(task_id)
        answer(sender, request, Outcome.FAILURE, exception)

    def retried(sender: Task, request: Any, reason: Any, **_: Any) -> None:
        answer(sender, request, Outcome.RETRY, reason if isinstance(reason, BaseException) else None)

    for signal, receiver in (
        (worker_ready, announce),
        (task_prerun, stamp),
        (task_success, succeeded),
        (task_failure, failed),
        (task_retry, retried),
    ):
        signal.connect(receiver, weak=False)


class _Unseen:
    """The request of a task that never started in the answering process."""

    def __init__(self, task_id: str) -> None:
        self.id = task_id


def checked_out(db: Alchemy) -> int | None:
    """Return how many connections this process has checked out; None if its connection pool does not count them."""
    count = getattr(db.engine.pool, "checkedout", None)
    return int(count()) if callable(count) else None
