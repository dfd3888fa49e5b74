"""Where the tasks that are measured work: a database of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import NullPool, create_engine

from ..rundir import run_directory
from ..services import database_server
from .rows import Base


@contextmanager
def database(url: str | None = None) -> Iterator[str]:
    """Yield the URL of a database with the table: a new one of DATABASE_URL's server, else of an embedded PostgreSQL.

    Args:
        url: Of a database to use as it is; the table stays, for others may be counting there.
    """
    if url is not None:
        _make_table(url)
        yield url
        return
    with (
        run_directory() as run,
        database_server(run, os.environ.get("DATABASE_URL")) as server,
        server.fresh_database(run, "overhead") as fresh,
    ):
        url = fresh.render_as_string(hide_password=False)
        _make_table(url)
        yield url


def _make_table(url: str) -> None:
    Base.metadata.create_all(create_engine(url, poolclass=NullPool))
