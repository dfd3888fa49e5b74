"""Run a `child.Job` on a database of its own, and read what it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from sqlalchemy import NullPool, create_engine

from ..services.rundir import run_directory
from ..services.starting import database_server
from .child import Job, command
from .rows import Base


class MeasureError(RuntimeError):
    """A process that was to be measured did not come to its end."""


class Child:
    """A process that answers line by line."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._said, self._told, self._errors = process.stdout, process.stdin, errors
        self.wait: Callable[..., int] = process.wait

    def answer(self) -> Any:
        """Return its next line.

        Raises:
            MeasureError: it has ended instead; the message ends with what it said.
        """
        assert self._said is not None
        line = self._said.readline()
        if not line:
            code = self.wait()
            self._errors.seek(0)
            raise MeasureError(f"The process that was to be measured ended with {code}:\n{self._errors.read()[-3000:]}")
        return json.loads(line)

    def go_on(self) -> None:
        """Let it go on: it waits for a line."""
        assert self._told is not None
        self._told.write("\n")
        self._told.flush()


@contextmanager
def started(job: Job, *before: str) -> Iterator[Child]:
    """Start the process of `job`, below the command `before`; it is killed where the block raises."""
    with _started(*before, sys.executable, *command(job), seed=job.seed) as child:
        yield child


@contextmanager
def _started(*arguments: str, seed: int = 0) -> Iterator[Child]:
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
    with _started(sys.executable, "-m", name, *arguments) as child:
        return child.answer()


@contextmanager
def database(url: str | None = None) -> Iterator[str]:
    """Yield the URL of a database with the table: a new one of DATABASE_URL's server, else of an embedded PostgreSQL.

    Args:
        url: Of a database to use as it is; the table stays, for others may be counting there.
    """
    with ExitStack() as stack:
        if url is None:
            run = stack.enter_context(run_directory())
            server = stack.enter_context(database_server(run, os.environ.get("DATABASE_URL")))
            url = stack.enter_context(server.fresh_database(run, "overhead")).render_as_string(hide_password=False)
        Base.metadata.create_all(create_engine(url, poolclass=NullPool))
        yield url
