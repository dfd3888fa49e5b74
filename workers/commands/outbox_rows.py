"""`celery alchemy outbox list | retry | drop`: what waits in the outbox, and what was set aside."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import click
from celery import Celery
from sqlalchemy import ColumnElement, Connection, Table, select
from sqlalchemy.exc import DBAPIError

from ...strategies.errors import CeleryAlchemyError
from ...strategies.features import outbox
from ...strategies.features.completed_table import recorded_id
from ...strategies.features.outbox_state import drift, printable
from ...strategies.features.outbox_table import database_now
from .. import apps
from ..crossing import on_its_loop
from ..sending.sender import table_of
from ..watching.outbox import as_json, engine_of

T = TypeVar("T")
Change = Callable[[Connection, Table, Sequence[ColumnElement[bool]]], int]
LONGEST_NAME = 255
SHOWN_ERROR = 100
"""Characters of an error in a line; `--json` has all of it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The rows that a command is about: those that fulfil all of it."""

    task_ids: tuple[str, ...] = ()
    task: str | None = None
    set_aside: bool = False

    def __bool__(self) -> bool:
        return bool(self.task_ids or self.task is not None or self.set_aside)


def show(app: Celery, choice: Choice, *, limit: int, to_json: bool) -> None:
    """Print the chosen rows, the oldest first, and how many there are in all.

    Raises:
        click.ClickException: the outbox cannot be looked at.
    """

    def look(connection: Connection, table: Table) -> tuple[float, list[outbox.Row], outbox.Counts]:
        now = float(connection.scalar(select(database_now())) or 0.0)
        conditions = _conditions(connection, table, choice)
        return now, outbox.listed(connection, table, conditions, limit), outbox.count(connection, table)

    now, rows, found = _in_database(app, look)
    if to_json:
        messages = [{**asdict(row), "state": _state(row, now)} for row in rows]
        click.echo(json.dumps({**as_json(found), "messages": messages}, indent=2))
        return
    for row in rows:
        click.echo(_line(row, now))
    oldest = "" if found.oldest_s is None else f", the oldest for {_span(found.oldest_s)}"
    more = f" (--limit {limit}: the oldest of them are shown)" if len(rows) == limit else ""
    sent = f"; {found.sent} sent, and not received yet" if found.sent else ""
    click.echo(f"{found.waiting} waiting{oldest}{sent}; {found.set_aside} set aside{more}")


def retry(app: Celery, choice: Choice, *, everything: bool, to_json: bool) -> None:
    """Let the chosen rows be sent at once, with all their attempts before them."""
    count = _change(app, choice, outbox.retry, everything=everything)
    words = "can be sent now; senders find them at their next look" if count else "there is none such to be sent again"
    _tell(count, words, to_json=to_json)


def drop(app: Celery, choice: Choice, *, everything: bool, to_json: bool) -> None:
    """Delete the chosen rows: they are not sent any more."""
    count = _change(app, choice, outbox.drop, everything=everything)
    _tell(count, "dropped" if count else "there is none such to be dropped", to_json=to_json)


def _change(app: Celery, choice: Choice, change: Change, *, everything: bool) -> int:
    if bool(choice) == everything:
        raise click.UsageError(
            "Say which messages: ids of tasks, --task NAME, --set-aside, or --all alone. `celery alchemy outbox list` "
            "shows them."
        )
    return _in_database(
        app, lambda connection, table: change(connection, table, _conditions(connection, table, choice))
    )


def _conditions(connection: Connection, table: Table, choice: Choice) -> list[ColumnElement[bool]]:
    task_ids = [*map(recorded_id, choice.task_ids)]
    conditions = outbox.chosen(table, task_ids=task_ids, task=choice.task, set_aside=choice.set_aside)
    if not task_ids:
        return conditions
    # Compared here: to MariaDB "a" and "A" are the same.
    found = connection.execute(select(table.c.id, table.c.task_id).where(*conditions))
    return [table.c.id.in_([row.id for row in found if row.task_id in task_ids])]


def _in_database(app: Celery, work: Callable[[Connection, Table], T]) -> T:
    """Return what `work` does in the database of the outbox, in a transaction that is committed."""
    app.loader.import_default_modules()
    db = apps.find(app)
    if db is None:
        raise click.ClickException(f"There is no outbox: {apps.explain_none(app)}")

    def run() -> T:
        table, engine = table_of(db), engine_of(db)
        try:
            with engine.begin() as connection:
                return work(connection, table)
        except DBAPIError as error:
            raise click.ClickException(_explain(engine, table, error)) from error

    try:
        return on_its_loop(db, run)
    except CeleryAlchemyError as error:
        raise click.ClickException(str(error)) from error


def _explain(engine: Any, table: Table, error: DBAPIError) -> str:
    try:
        with engine.connect() as connection:
            other = drift(connection, table)
    except DBAPIError:
        other = None
    if other is not None:
        return f"The outbox cannot be looked at: {other}"
    return f"The outbox cannot be looked at: {' '.join(str(error.orig).split())}"


def _line(row: outbox.Row, now: float) -> str:
    error = "" if row.error is None else f"  {printable(row.error, SHOWN_ERROR)}"
    failures = f", {row.attempts} failed" if row.attempts else ""
    names = f"{printable(row.task_id, LONGEST_NAME)}  {printable(row.task, LONGEST_NAME)}"
    return f"{names}  {_span(now - row.created_at)} old, {_state(row, now)}{failures}{error}"


def _state(row: outbox.Row, now: float) -> str:
    if row.due_at is None:
        return "set aside"
    if row.expires_at is not None and row.expires_at < now:
        return "expired"
    if row.due_at <= now:
        return "due again" if row.sends else "due"
    if row.sends:
        return f"sent, waits for its receiver, sent again in {_span(row.due_at - now)}"
    return f"{'due again' if row.attempts else 'being sent, or due'} in {_span(row.due_at - now)}"


def _span(seconds: float) -> str:
    """Return a length of time as people write it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _tell(count: int, words: str, *, to_json: bool) -> None:
    if to_json:
        click.echo(json.dumps({"messages": count}))
    else:
        click.echo(f"{count} message{'' if count == 1 else 's'}: {words}")
    if not count:
        raise SystemExit(1)
