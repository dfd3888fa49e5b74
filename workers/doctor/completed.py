"""Whether the table of completed tasks is there."""

from __future__ import annotations

from collections.abc import Iterator

from celery import Celery
from celery.app.backends import by_url
from celery.exceptions import ImproperlyConfigured
from sqlalchemy import Engine, inspect

from ...strategies.errors import InvalidSetting
from ...strategies.features.completed_table import HOW_TO_CREATE, chosen_completed_table
from ..exactly_once.backend import AlchemyBackend
from ..extension import Alchemy
from .findings import Finding, error


def keeps_results(app: Celery) -> str:
    """Say that results are kept in the table of completed tasks; "" where they are not."""
    try:
        backend, _ = by_url(app.conf.result_backend, app.loader)
    except (ImproperlyConfigured, ImportError):
        return ""  # the worker says so at its start
    return "Results are kept in it (result_backend)" if issubclass(backend, AlchemyBackend) else ""


def look_at_completed(db: Alchemy, engine: Engine, by: str) -> Iterator[Finding]:
    """Yield what is wrong with the table of completed tasks of `db`, the app's default database.

    Args:
        by: Who needs it.
    """
    try:
        table = chosen_completed_table(db.settings.completed_table)
    except InvalidSetting as refused:
        yield error("completed-table", str(refused), "Set alchemy_completed_table.", "alchemy_completed_table")
        return
    there = inspect(engine)
    if not there.has_table(table.name, schema=table.schema):
        what = f"{by}, but the database has no table {table.fullname!r}: tasks fail."
        yield error("completed-table", what, f"Create it: {HOW_TO_CREATE}.", "exactly_once")
        return
    found = {column["name"] for column in there.get_columns(table.name, schema=table.schema)}
    missing = [column.name for column in table.columns if column.name not in found]
    if missing:
        what = f"The table {table.fullname!r} has no column {', '.join(missing)}, which this version needs."
        yield error("completed-table", what, "Let Alembic compare it: docs/exactly-once.md.", "exactly_once")
