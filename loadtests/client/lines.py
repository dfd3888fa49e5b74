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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import LoadTestError
from ..services.guard import with_package

STOP_S = 30.0
LOG_LINES = 20

logger: logging.Logger = logging.getLogger(__name__)


class LineProcess:
    """A child that is asked: the parent's side. Safe to use from several threads or greenlets."""

    def __init__(
        self, name: str, *arguments: str, log: Path | None = None, below: Sequence[str] = (),
        environ: Mapping[str, str] = os.environ,
    ) -> None:  # fmt: skip
        """Start Python with these arguments; Ctrl-C does not reach it.

        Args:
            log: Where its standard error goes, if not to ours; its end is part of what is raised.
            below: A command that runs it.
        """
        inherited = {name: value for name, value in environ.items() if not name.startswith("CELERY")}
        self._name, self._log, self._lock = name, log, threading.Lock()
        with log.open("wb") if log else nullcontext() as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own modules.
                [*below, sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, env=with_package(inherited), text=True, start_new_session=True,
            )  # fmt: skip
        self.pid: int = self._process.pid
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"answers of {name}", daemon=True)
        self._reader.start()

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
                line = json.dumps({"error": f"{self._name} did not answer within {within_s:g} s: {command}"})
        if not line:
            self._answers.put("")
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"{self._name} ended."}
        if "error" in answer:
            lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:] if self._log else []
            raise LoadTestError("\n".join([answer["error"], *lines]))
        return answer

    def stop(self, within_s: float = STOP_S) -> None:
        """End it, by closing its stdin first; kill it if that does not help."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        self.kill()
        self._process.wait(within_s)
        self._reader.join(within_s)

    def kill(self) -> None:
        """Kill it with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put("")


def leave_on_signals() -> None:
    """Unwind on SIGINT, SIGTERM and SIGHUP, so that every server and worker is stopped on the way out.

    Also where they are ignored, as by a shell in the background: a run that nothing stops leaves its servers.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


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
                print(json.dumps(answer), file=answers, flush=True)
