"""Two processes that talk in lines of JSON: one command, one answer, and so on.

The end of the child's stdin ends it, so that nothing outlives a parent that was killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import LoadTestError
from ..services.guard import with_package

STOP_S = 30.0

logger: logging.Logger = logging.getLogger(__name__)


class LineProcess:
    """A child that is asked: the parent's side. Safe to use from several threads or greenlets."""

    def __init__(self, name: str, module: str, *arguments: str, **options: Any) -> None:
        """Start `python -m module`; Ctrl-C does not reach it."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CELERY")}
        self._name, self._lock = name, threading.Lock()
        self._process = subprocess.Popen(  # noqa: S603 - our own modules.
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=with_package(inherited),
            text=True,
            start_new_session=True,
            **options,
        )
        self.pid: int = self._process.pid
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"answers of {name}", daemon=True).start()

    def ask(self, within_s: float, **command: Any) -> dict[str, Any]:
        """Send a command, and return the answer.

        Raises:
            LoadTestError: The child refused it, gave no answer in time, or ended.
        """
        assert self._process.stdin is not None
        with self._lock:
            with contextlib.suppress(OSError):
                self._process.stdin.write(json.dumps(command) + "\n")
                self._process.stdin.flush()
            try:
                line = self._answers.get(timeout=within_s)
            except queue.Empty:
                raise LoadTestError(f"{self._name} did not answer within {within_s:g} s: {command}") from None
        if not line:
            self._answers.put("")
            raise LoadTestError(f"{self._name} ended.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LoadTestError(answer["error"])
        return answer

    def stop(self, within_s: float = STOP_S) -> None:
        """End it, by closing its stdin first; kill it if that does not help."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(within_s)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")


def answer_lines(commands: Iterable[str], execute: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each command with what `execute` returns: the child's side. Whatever else is printed goes to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in commands:
            try:
                answer = execute(json.loads(line))
            except LoadTestError as error:
                answer = {"error": str(error)}
            except Exception as error:
                # Whatever one command asks for, the next must find the process alive.
                logger.exception("A command failed: %s", line)
                answer = {"error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(BrokenPipeError):
                answers.write(json.dumps(answer) + "\n")
                answers.flush()
