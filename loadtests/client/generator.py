"""The benchmark's load generator: one long-lived Locust process that takes its commands from stdin.

One JSON object per line on stdin, one answer per command on stdout, the log on stderr; the end of stdin ends it.

    {"open": {"arm": ..., "broker_url": ..., "reply_url": ..., "queue": ...}}
    {"slice": {"number": 17, "arm": ..., "workload": "transfer", "users": 8, "seconds": 1.0, "ramp_s": 0.1}}
    {"slice": {..., "users": 8, "tasks": 300}}                                      exactly 300 tasks
    {"slice": {..., "rate_per_s": 50.0, "seconds": 4.0, "arrival": "poisson"}}      arrivals, whatever the worker does
    {"slice": {..., "task": "proj.tasks.x", "args": [1], "kwargs": {}}}             somebody else's task
    {"close": {"arm": ...}}

A slice appends one `TaskRow` per task to the file, without a header, before it is answered.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

START = "import locust; from celery_alchemy.loadtests.client.generator import main; main()"


def serve(rows_path: Path, commands: Any, answers: IO[str]) -> None:
    """Take commands until there are no more."""
    from .slices import Slices

    with rows_path.open("a", newline="") as rows, Slices(rows) as slices:
        for line in commands:
            try:
                answer = slices.execute(json.loads(line))
            except Exception as error:
                # Whatever one command asks for, the next must find the process alive.
                logging.getLogger(__name__).exception("A command failed: %s", line)
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


@contextmanager
def _answers_only() -> Iterator[IO[str]]:
    """Yield what was stdout; whatever else is printed goes to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        yield answers


def main() -> None:
    """Run as `python -m celery_alchemy.loadtests.client.generator --rows FILE`."""
    parser = ArgumentParser(description="The benchmark's load generator.")
    parser.add_argument("--rows", type=Path, required=True, help="CSV file to append a row to for each task.")
    options = parser.parse_args()
    if "locust" not in sys.modules:
        # Locust has to patch the standard library before this package, Celery and SQLAlchemy have imported it.
        os.execv(sys.executable, [sys.executable, "-c", START, *sys.argv[1:]])  # noqa: S606 - ourselves.
    from gevent.fileobject import FileObject

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with _answers_only() as answers:
        # A plain read of stdin would stop every greenlet.
        serve(options.rows, FileObject(0, "r", closefd=False), answers)


if __name__ == "__main__":
    main()
