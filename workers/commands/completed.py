"""`celery alchemy completed list | prune`: which tasks with `exactly_once` are recorded."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click
from celery import Celery
from sqlalchemy.exc import DBAPIError

from ...strategies.errors import CeleryAlchemyError
from ...strategies.features.completed import SENT, Listed
from ...strategies.features.completed_table import recorded_id
from ...strategies.features.outbox_state import printable
from ...strategies.names import counted
from .. import apps
from ..exactly_once.rows import Rows
from ..sending.kept import again_within_s

LONGEST_NAME = 255
_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw]?)")


def seconds_of(span: str) -> float:
    """Return the seconds of `7d`, `12h`, `90m` or a number of seconds.

    Raises:
        click.BadParameter: it is none.
    """
    found = _SPAN.fullmatch(span.strip())
    if found is None:
        raise click.BadParameter(
            f"{span!r} is no span of time: write 7d (days), 12h (hours), 90m (minutes) or a number of seconds."
        )
    return float(found[1]) * _UNITS_S[found[2]]


def show(app: Celery, task_ids: tuple[str, ...], task: str | None, *, limit: int, to_json: bool) -> None:
    """Print the rows, the newest first.

    Raises:
        click.ClickException: the table cannot be looked at.
    """
    with _opened(app) as rows:
        found = rows.listed(task_ids=[*map(recorded_id, task_ids)], task=task, limit=limit)
    if to_json:
        click.echo(json.dumps([asdict(row) for row in found], indent=2))
        return
    for row in found:
        click.echo(_line(row))
    click.echo(f"{len(found)} shown" + (f" (--limit {limit}: the newest)" if len(found) == limit else ""))


def prune(app: Celery, older_than: str, *, force: bool) -> None:
    """Delete the rows that are older.

    Raises:
        click.ClickException: the table cannot be looked at, or the message of such a task may come again.
    """
    older_than_s = seconds_of(older_than)
    with _opened(app) as rows:
        within_s = again_within_s(apps.get(app))
        if within_s is not None and older_than_s <= within_s and not force:
            raise click.UsageError(
                f"--older-than {older_than} is not more than {within_s:.0f} s. A message may come again after that "
                f"(the broker's visibility timeout, alchemy_outbox_resend_s), and its task would run again. --force "
                f"deletes all the same."
            )
        count = rows.prune(older_than_s)
    click.echo(f"{counted(count, 'row')} deleted")


@contextmanager
def _opened(app: Celery) -> Iterator[Rows]:
    app.loader.import_default_modules()
    db = apps.find(app)
    if db is None:
        raise click.ClickException(f"No task is recorded: {apps.explain_none(app)}")
    rows = Rows(db)
    try:
        yield rows
    except DBAPIError as error:
        said = rows.explained(error)
        raise click.ClickException(f"{type(said).__name__}: {said}") from error
    except CeleryAlchemyError as error:
        raise click.ClickException(str(error)) from error


def _line(row: Listed) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row.completed_at))
    nested = f" (replaced {counted(row.nesting, 'time')})" if row.nesting else ""
    result = f"{counted(row.length or 0, 'character')} of result"
    what = result if row.note in {None, "", SENT} else printable(row.note, 60)
    return f"{at}Z  {printable(row.task, LONGEST_NAME)}[{printable(row.task_id, LONGEST_NAME)}]{nested}  {what}"
