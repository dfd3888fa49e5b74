"""The load generator as the orchestrator sees it: a process that takes one command after the other.

It runs Locust, which monkey-patches whatever imports it, so it is never in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ..environment import WorkerEnvironment
from ..errors import LoadTestError
from ..guard import with_package
from ..processes import deferred_signals
from ..rows import TaskRow, parse_rows
from ..rundir import RunDirectory

START_S = 60.0
ANSWER_S = 60.0
"""On top of what a command is meant to take."""
STOP_S = 10.0


class GeneratorError(LoadTestError):
    """The load generator ended, or did not answer; the message ends with its log."""


class Generator:
    """One long-lived Locust process."""

    def __init__(self, process: subprocess.Popen[str], rows_path: Path, log_path: Path) -> None:
        self._process = process
        self._rows_path = rows_path
        self._log_path = log_path
        self._offset = 0
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="generator-answers", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def open(self, arm: str, environment: WorkerEnvironment) -> None:
        """Connect to an arm's broker and reply list."""
        self._ask(
            {
                "open": {
                    "arm": arm,
                    "broker_url": environment.broker_url,
                    "reply_url": environment.reply_url,
                    "queue": environment.queue,
                    "pattern": environment.pattern,
                }
            },
            START_S,
        )

    def slice(self, *, within_s: float, **command: Any) -> tuple[dict[str, Any], list[TaskRow]]:
        """Put an arm under load, and return the summary and a row for each task.

        Args:
            within_s: How long the load itself can take; an answer may come a minute later.
        Raises:
            GeneratorError: No answer came, or the command was refused.
        """
        answer = self._ask({"slice": command}, within_s)
        return answer, self._new_rows()

    def forget_rows(self) -> None:
        """Throw the rows away that were returned already."""
        os.truncate(self._rows_path, 0)
        self._offset = 0

    def close(self, arm: str) -> None:
        """Disconnect from an arm."""
        self._ask({"close": {"arm": arm}}, 0)

    def stop(self) -> None:
        """End it, by closing its commands first."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_S)

    def _ask(self, command: dict[str, Any], within_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise GeneratorError(f"The load generator is gone.\n{self._log()}") from error
        try:
            line = self._answers.get(timeout=within_s + ANSWER_S)
        except queue.Empty:
            raise GeneratorError(f"The load generator did not answer {command}.\n{self._log()}") from None
        if line is None:
            raise GeneratorError(f"The load generator ended.\n{self._log()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise GeneratorError(f"The load generator refused {command}: {answer['error']}\n{self._log()}")
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _new_rows(self) -> list[TaskRow]:
        with self._rows_path.open(newline="") as file:
            file.seek(self._offset)
            rows = list(parse_rows(file))
            self._offset = file.tell()
        return rows

    def _log(self) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-20:])
        return ""

    @classmethod
    @contextmanager
    def running(cls, run: RunDirectory) -> Iterator[Self]:
        """Start it, and end it when the block ends."""
        rows_path, log_path = run.path / "rows.csv", run.path / "generator.log"
        rows_path.touch()
        command = [sys.executable, "-m", "celery_alchemy.loadtests.client.generator", "--rows", str(rows_path)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CELERY")}
        with deferred_signals(), log_path.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own module.
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=with_package(inherited),
                text=True,
                start_new_session=True,
            )
            guarded = run.guard.watch_process(process.pid)
        generator = cls(process, rows_path, log_path)
        try:
            yield generator
        finally:
            generator.stop()
            run.guard.forget(guarded)
