"""What became of a task: its row, and whether it ended as it was meant to."""

from __future__ import annotations

import re

from ..bench.checks import failure
from ..rows import UNANSWERED, TaskRow
from ..workloads import WORKLOADS, Workload
from .hub import Pending

ERROR_LENGTH = 120


class TaskFailed(Exception):
    """The worker says that the task failed, or it ended otherwise than it was meant to."""


class TaskUnanswered(Exception):
    """No final reply came in time."""


def row_of(pending: Pending, *, workload: str, number: int = 0, arm: str = "", slice_number: int = 0) -> TaskRow:
    """Return the row of a task that has ended, or was given up."""
    final = pending.final
    error = pending.error
    return TaskRow(
        slice=slice_number,
        arm=arm,
        workload=workload,
        number=number,
        task_id=pending.task_id,
        intended=pending.intended,
        sent=pending.sent,
        started=final.started if final else 0.0,
        ended=final.ended if final else 0.0,
        outcome=final.outcome.value if final else UNANSWERED,
        attempts=pending.attempts,
        checkout_ms=final.checkout_ms if final else 0.0,
        database_ms=final.database_ms if final else 0.0,
        finals=pending.finals,
        pid=final.pid if final else 0,
        breach=pending.breach,
        error_type=(final.error_type or "") if final else type(error).__name__ if error else "",
        error=(final.error or "") if final else str(error) if error else "",
    )


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


def workload_named(name: str) -> Workload | None:
    """Return the workload of this name; None if it is a task of somebody else's."""
    return WORKLOADS.get(name)


def _alike(message: str) -> str:
    """Return the message without what differs from task to task: Locust keeps every different one."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "N", message)[:ERROR_LENGTH]
