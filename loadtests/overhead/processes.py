"""Start a `child` on a database of its own, and ask it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import NullPool, create_engine

from ..client.lines import STOP_S, LineProcess
from ..services.databases import database_server
from ..services.rundir import run_directory
from . import child
from .rows import Base

LONGEST_S = 3600.0  # Under valgrind some questions take minutes


class Child(LineProcess):
    """The process that is measured."""

    def call(self, measure: Callable[..., object], *arguments: object) -> Any:
        """Return what a function of a module returns there, which is given the sides before `arguments`.

        Raises:
            LoadTestError: It failed there, or the process has ended; the message ends with what it said.
        """
        module = sys.modules[measure.__module__].__spec__
        assert module is not None
        function = f"{module.name}:{measure.__name__}"
        return self.ask(LONGEST_S, function=function, arguments=arguments)["found"]


@contextmanager
def started(
    pool: str, strategy: str, url: str, *sides: str, below: Sequence[str] = (), seed: int = 0
) -> Iterator[Child]:
    """Start the process that acts as a worker pool; it is gone when the block ends, at once where that raises.

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
    with tempfile.TemporaryDirectory(prefix="celery-alchemy-child-") as folder:
        words, log = ("-c", program, pool, strategy, url, *sides), Path(folder) / "log"
        process = Child("The process that is measured", *words, log=log, below=below, environ=environ)
        try:
            process.call(child.ready)
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            process.stop(LONGEST_S if below else STOP_S)


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
