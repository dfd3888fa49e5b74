"""What became of a task: its row, and whether it ended as it was meant to."""

from __future__ import annotations

import re
from typing import Any

from ..bench.checks import failure
from ..bench.rows import UNANSWERED, TaskRow
from ..tasks.workloads import Workload
from .hub import Pending

ERROR_LENGTH = 120


class TaskFailed(Exception):
    """The worker says that the task failed, or it ended otherwise than it was meant to."""


class TaskUnanswered(Exception):
    """No final reply came in time."""


def row_of(pending: Pending, *, workload: str, number: int = 0, arm: str = "", slice_number: int = 0) -> TaskRow:
    """Return the row of a task that has ended, or was given up."""
    final, error, told = pending.final, pending.error, dict[str, Any]()
    if final:
        told = {"error_type": final.error_type or "", "error": final.error or "", "pid": final.pid}
    elif error:
        told = {"error_type": type(error).__name__, "error": str(error)}
    times = (final.started, final.ended) if final else (0.0, 0.0)
    spent = (final.checkout_ms, final.database_ms) if final else (0.0, 0.0)
    return TaskRow(
        slice_number, arm, workload, number, pending.task_id, pending.intended, pending.sent, *times,
        final.outcome.value if final else UNANSWERED, pending.attempts, *spent, pending.finals,
        breach=pending.breach, **told,
    )  # fmt: skip


def failure_of(row: TaskRow, workload: Workload | None) -> Exception | None:
    """Return what to count a task as failed for; None if it ended as it was meant to.

    Some tasks of the workload `mix` are meant to raise: those that do have not failed.

    Args:
        workload: None for a task of somebody else's, which is meant to succeed.
    """
    if row.outcome == UNANSWERED:
        return TaskUnanswered(row.error_type and f"not sent: {row.error_type}: {_alike(row.error)}")
    wrong = failure(row, workload)
    return TaskFailed(_alike(wrong)) if wrong else None


def phases_of(row: TaskRow) -> dict[str, float]:
    """Return the milliseconds of each phase that was measured; events do not tell of the database."""
    database = {"checkout": row.checkout_ms, "database": row.database_ms}
    return {"queue": row.queue_ms, "run": row.run_ms, **(database if any(database.values()) else {})}


def _alike(message: str) -> str:
    """Return the message without what differs from task to task: Locust keeps every different one."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "N", message)[:ERROR_LENGTH]
