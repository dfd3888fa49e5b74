"""Start a `child` on a database of its own, and ask it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from sqlalchemy import NullPool, create_engine

from ..services.databases import database_server
from ..services.rundir import run_directory
from . import child
from .rows import Base


class MeasureError(RuntimeError):
    """A process that was to be measured did not come to its end."""


class Child:
    """A process that answers line by line."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process, self._errors = process, errors
        self.pid: int = self._answer()

    def ask(self, measure: Callable[..., object], *arguments: object) -> Any:
        """Return what a function of a module returns there, which is given the sides before `arguments`.

        Raises:
            MeasureError: it has ended instead; the message ends with what it said.
        """
        assert self._process.stdin is not None
        module = sys.modules[measure.__module__].__spec__
        assert module is not None
        self._process.stdin.write(f"{json.dumps([f'{module.name}:{measure.__name__}', *arguments])}\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Let it end, and wait for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise MeasureError(f"The process that was to be measured ended with {code}:\n{self._errors.read()[-3000:]}")
        return json.loads(line)


@contextmanager
def started(
    pool: str, strategy: str, url: str, *sides: str, below: Sequence[str] = (), seed: int = 0
) -> Iterator[Child]:
    """Start the process that acts as a worker pool; it is killed where the block raises.

    Args:
        below: A command that runs it.
        seed: Of Python's hashes: the same order of sets on every run.
    """
    # Under gevent the patch comes first, and therefore not from a module of this package.
    first = "from gevent import monkey; monkey.patch_all(); " if pool == "gevent" else ""
    program = f"{first}from {child.__name__} import main; main()"
    # Compiled modules: to compile them is most of what a start costs.
    environ = {**os.environ, "PYTHONHASHSEED": str(seed)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    environ.setdefault("PYTHONPYCACHEPREFIX", os.path.join(tempfile.gettempdir(), f"celery-alchemy-pyc-{os.getuid()}"))
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(  # noqa: S603 - our own interpreter
            [*below, sys.executable, "-c", program, pool, strategy, url, *sides],
            stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environ,
        ) as process,
    ):  # fmt: skip
        try:
            yield Child(process, errors)
        except BaseException:
            process.kill()
            raise


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
