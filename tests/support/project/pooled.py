"""Tasks behind a connection pooler that gives every transaction another connection of the server."""

import time
from typing import Any

from sqlalchemy import select, text

from support.project.app import task
from support.project.models import Row


@task()
def write_through_pooler(self: Any, key: str, note: str) -> list[Any]:
    """The same statement often enough that psycopg would prepare it; a name and a limit for the transaction."""
    for _ in range(8):
        self.db.execute(select(Row.note).where(Row.key == key)).all()
    self.db.add(Row(key=key, note=note))
    time.sleep(0.002)
    asking = "SELECT current_setting('application_name'), current_setting('statement_timeout'), pg_backend_pid()"
    return list(self.db.execute(text(asking)).one())


@task(read_only=True)
def read_through_pooler(self: Any, key: str) -> list[Any]:
    for _ in range(8):
        found = self.db.execute(select(Row.note).where(Row.key == key)).all()
    return [len(found), self.db.scalar(text("SHOW transaction_read_only"))]


@task(read_only=True)
def write_though_read_only_through_pooler(self: Any, key: str) -> None:
    self.db.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, 'must not be there')"), {"key": key})
