"""Tasks that only read."""

from typing import Any

from sqlalchemy import select

from support.project.app import task
from support.project.models import Row


@task(read_only=True)
def read_only(self: Any, key: str) -> list[str]:
    return list(self.db.scalars(select(Row.note).where(Row.key == key)))


@task(read_only=True)
def write_though_read_only(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="must not be there"))
