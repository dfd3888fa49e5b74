"""A connection to SQLite that is thrown away in the middle of an answer keeps no lock, whoever still has its error."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Engine, event, text
from support.databases import SQLite, new_sqlite
from support.project.models import Row

from celery_alchemy import Alchemy

#: Several rows, so that the first one is not the end of the answer.
ROWS = "SELECT 1 AS number UNION ALL SELECT 2 UNION ALL SELECT 3"


class Killed(BaseException):
    """As `SystemExit`, or one of a greenlet."""


@pytest.fixture
def database(tmp_path: Path) -> Iterator[SQLite]:
    with new_sqlite(tmp_path / "locks.sqlite3") as database:
        yield database


@pytest.mark.parametrize("kind", [SoftTimeLimitExceeded, Killed])
def test_its_locks_are_free_while_the_error_is_kept(
    database: SQLite, tmp_path: Path, key: str, kind: type[BaseException]
) -> None:
    """sqlite3 closes a connection that has an open cursor only when that is collected."""
    app = Celery("locks", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = database.url("locks")
    db = Alchemy(app)

    @db.on_engine
    def listen(engine: Engine) -> None:
        @event.listens_for(engine, "after_cursor_execute")
        def strike(connection: object, cursor: object, statement: str, *_: Any) -> None:
            if statement == ROWS:
                raise kind

    with pytest.raises(kind) as kept, db.unit_of_work() as session:
        session.add(Row(key=key, note="struck"))
        session.flush()
        session.execute(text(ROWS))
    other = sqlite3.connect(tmp_path / "locks.sqlite3", isolation_level=None, timeout=2)
    other.execute("BEGIN IMMEDIATE")
    other.execute("ROLLBACK")
    other.close()
    assert kept.value is not None
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="next"))
    assert database.rows(key) == ["next"]
    db.dispose()
    app.close()
