"""Tasks that meet their soft time limit."""

from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text

from support.project.app import task
from support.project.models import Row


@task()
def sleep_in_sql(self: Any, key: str, seconds: float = 60) -> None:
    self.db.add(Row(key=key))
    self.db.flush()
    self.db.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


@task()
def sleep_in_sql_caught(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="before the limit"))
    self.db.flush()
    try:
        self.db.execute(text("SELECT pg_sleep(60)"))
    except SoftTimeLimitExceeded:
        self.db.rollback()
    self.db.add(Row(key=key, note="after the limit"))


@task()
def write_steadily(self: Any, key: str, note: str) -> None:
    """Many short statements and savepoints: a limit strikes anywhere between or in them."""
    self.db.add(Row(key=key, note=note))
    for number in range(60):
        with self.db.begin_nested():
            self.db.add(Row(key=f"{key}-{number}", note=note))
        self.db.scalar(text("SELECT pg_backend_pid()"))


@task()
def busy(self: Any, key: str, catch: bool) -> None:
    """Meet the limit in Python code, between two statements."""
    self.db.add(Row(key=key, note="before the limit"))
    self.db.flush()
    try:
        while True:
            sum(range(1000))
    except SoftTimeLimitExceeded:
        if not catch:
            raise
    self.db.add(Row(key=key, note="after the limit"))
