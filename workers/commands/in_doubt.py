"""`celery alchemy in-doubt`: what a crash between the two phases of a COMMIT has left."""

from __future__ import annotations

import time

import click
from celery import Celery
from sqlalchemy.exc import DBAPIError

from ...strategies.several import in_doubt
from .. import apps


def report(app: Celery, *, wait_s: float, resolve: bool) -> None:
    """Print the prepared transactions that are still there after `wait_s` seconds, and resolve them if asked.

    Raises:
        click.ClickException: the app has no Alchemy, or some are left.
    """
    app.loader.import_default_modules()
    db = apps.find(app)
    if db is None:
        raise click.ClickException(f"No database to look at: {apps.explain_none(app)}")
    engines = {name: one.engine for name, one in db.databases.items()}
    try:
        found = in_doubt.find(engines)
    except DBAPIError as error:
        raise click.ClickException(f"The prepared transactions cannot be listed: {error.orig}") from error
    if found:
        click.echo(f"{len(found)} prepared; looking again in {wait_s:g} s, for one that commits now is not in doubt")
        time.sleep(wait_s)
        before = {one.name for one in found}
        found = [one for one in in_doubt.find(engines) if one.name in before]
    left = 0
    for one in found:
        what = (
            "to be committed: the database that decides has" if one.commits else "to be rolled back: nothing of it is"
        )
        click.echo(f"{one.database}: {one.name}: {what} committed")
        if not resolve:
            left += 1
            continue
        try:
            in_doubt.resolve(engines, one)
            click.echo("  done")
        except DBAPIError as error:
            left += 1
            click.echo(f"  not done: {error.orig}")
    if left:
        raise click.ClickException(f"{left} in doubt{'' if resolve else '; add --resolve to end them so'}.")
    if not found:
        click.echo("nothing in doubt")
