"""Run a `child.Job`, and read what it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from .child import Job, command


class MeasureError(RuntimeError):
    """A process that was to be measured did not come to its end."""


class Child:
    """A process that answers line by line."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process, self._errors = process, errors

    def answer(self) -> Any:
        """Return its next line.

        Raises:
            MeasureError: it has ended instead; the message ends with what it said.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise MeasureError(f"The process that was to be measured ended with {code}:\n{self._errors.read()[-3000:]}")
        return json.loads(line)

    def go_on(self) -> None:
        """Let it go on: it waits for a line."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait()


@contextmanager
def started(job: Job, *before: str) -> Iterator[Child]:
    """Start the process of `job`, below the command `before`; it is killed where the block raises."""
    with _started([*before, sys.executable, *command(job)], job.seed) as child:
        yield child


@contextmanager
def _started(arguments: list[str], seed: int = 0) -> Iterator[Child]:
    # Compiled modules: to compile them is most of what a start costs.
    environ = {**os.environ, "PYTHONHASHSEED": str(seed)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    environ.setdefault("PYTHONPYCACHEPREFIX", os.path.join(tempfile.gettempdir(), f"celery-alchemy-pyc-{os.getuid()}"))
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environ) as process,  # noqa: S603 - our own interpreter
    ):
        try:
            yield Child(process, errors)
        except BaseException:
            process.kill()
            raise


def run(job: Job) -> Any:
    """Return the one answer of `job`."""
    with started(job) as child:
        return child.answer()


def run_module(name: str, *arguments: str) -> Any:
    """Return what a module prints, which is one line of JSON."""
    with _started([sys.executable, "-m", name, *arguments]) as child:
        return child.answer()
