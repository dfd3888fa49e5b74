"""The benchmark's load generator: one long-lived gevent process that takes its commands from stdin.

    python -m gevent.monkey --module celery_alchemy.loadtests.client.generator

    {"open": {"arm": ..., "broker_url": ..., "reply_url": ..., "queue": ...}}
    {"slice": {"number": 17, "arm": ..., "workload": "transfer", "users": 8, "seconds": 1.0, "ramp_s": 0.1}}
    {"slice": {..., "users": 8, "tasks": 300}}                                      exactly 300 tasks
    {"slice": {..., "rate_per_s": 50.0, "seconds": 4.0, "arrival": "poisson"}}      arrivals, whatever the worker does
    {"slice": {..., "rate_per_s": 50.0, "seconds": 4.0, "limit_ms": 50.0}}          skips those that are overdue, counts
    {"slice": {..., "task": "proj.tasks.x", "args": [1], "kwargs": {}}}             somebody else's task
    {"close": {"arm": ...}}

The answer to a slice has its `rows`: the values of a `TaskRow` for each task.
"""

from __future__ import annotations

import logging
import sys

from gevent.fileobject import FileObject

from .lines import answer_lines
from .slices import Slices


def main() -> None:
    """Answer commands until the end of stdin."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with Slices() as slices:
        # A plain read of stdin would stop every greenlet.
        answer_lines(FileObject(0, "r", closefd=False), slices.execute)


if __name__ == "__main__":
    main()
