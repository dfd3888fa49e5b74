"""Tasks that only read."""

from typing import Any

from sqlalchemy import select, text

from celery_alchemy import TransientDatabaseError
from support.project.app import task
from support.project.models import Row


@task(read_only=True)
def read_only(self: Any, key: str) -> list[str]:
    return list(self.db.scalars(select(Row.note).where(Row.key == key)))


@task(read_only=True)
def write_though_read_only(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="must not be there"))


@task(read_only=True)
def read_changing(self: Any) -> int:
    """Read a table that a migration changes; the columns it has are what is selected."""
    return len(self.db.execute(text("SELECT * FROM changing")).all())


@task(autoretry_for=(TransientDatabaseError,), default_retry_delay=0.05, max_retries=3)
def read_changing_in_transaction(self: Any) -> int:
    return len(self.db.execute(text("SELECT * FROM changing")).all())
