"""The chord of the fan-out workload: sent inside the root's task, as its users do."""

from __future__ import annotations

from typing import Any

from celery import chord

from . import phases
from .workloads import FAN_OUT_COLLECT, FAN_OUT_PART, PARTS, Call


def send_parts(call: Call) -> None:
    """Send the parts, and the task that collects what they return; all write under the id of the root."""
    tasks, measurement = call.task.app.tasks, phases.current()
    # What the reply to the root has to tell: on the way from task to task, for no process sees them all.
    root = {"root_id": call.task_id, "root_started": measurement.started, "root_breach": measurement.breach}
    reply_to = getattr(call.task.request, "loadtest_reply", None)
    options: dict[str, Any] = {"headers": {"loadtest_reply": reply_to}} if reply_to else {}
    part, collect = tasks[FAN_OUT_PART.task_name], tasks[FAN_OUT_COLLECT.task_name]
    parts = [part.s(call.number, part=index, **root).set(**options) for index in range(PARTS)]
    chord(parts)(collect.s(call.number, **root).set(**options))
