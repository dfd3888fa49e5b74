"""The chord of the fan-out workload: sent inside the root's task, as its users do."""

from __future__ import annotations

import time
from typing import Any

from celery import chord

from .workloads import FAN_OUT_COLLECT, FAN_OUT_PART, PARTS, Call


def send_parts(call: Call) -> None:
    """Send the parts, and the task that collects what they return; both write under the id of the root."""
    request, tasks = call.task.request, call.task.app.tasks
    # What the reply to the root needs to know: on the way from task to task, for no process sees them all.
    root = {"root_id": call.task_id, "root_started": getattr(request, "loadtest_started", None) or time.monotonic()}
    to = getattr(request, "loadtest_reply", None)
    options: dict[str, Any] = {"headers": {"loadtest_reply": to}} if to else {}
    parts = [
        tasks[FAN_OUT_PART.task_name].s(call.number, part=part, **root).set(**options) for part in range(PARTS)
    ]  # fmt: skip
    chord(parts)(tasks[FAN_OUT_COLLECT.task_name].s(call.number, **root).set(**options))
