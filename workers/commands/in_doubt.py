"""`celery alchemy in-doubt`: what a crash between the two phases of a COMMIT has left."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from celery import Celery
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from ...strategies.errors import CeleryAlchemyError
from ...strategies.several import in_doubt
from .. import apps
from ..crossing import on_their_loop

Result = TypeVar("Result")


def report(app: Celery, *, wait_s: float, resolve: bool) -> None:
    """Print the prepared transactions that are still there after `wait_s` seconds, and resolve them if asked.

    Raises:
        click.ClickException: the app has no Alchemy, or some of its own are left.
    """
    app.loader.import_default_modules()
    db = apps.find(app)
    if db is None:
        raise click.ClickException(f"No database to look at: {apps.explain_none(app)}")
    databases = db.databases
    found = _look(databases)
    if found.ours or found.foreign:
        count = len(found.ours) + len(found.foreign)
        click.echo(f"{count} prepared; looking again in {wait_s:g} s, for one that commits now is not in doubt")
        time.sleep(wait_s)
        before = {one.name for one in found.ours} | {one.name for one in found.foreign}
        found = _look(databases)
        found = in_doubt.Findings(
            [one for one in found.ours if one.name in before], [one for one in found.foreign if one.name in before]
        )
    for other in found.foreign:
        click.echo(f"{other.database}: {other.name}: not of this app, left alone: {other.why}")
    unknown = sum(other.may_be_ours for other in found.foreign)
    left = _end(databases, found.ours, resolve=resolve)
    if unknown:
        raise click.ClickException(f"{left + unknown} in doubt, {unknown} of them to be ended by hand.")
    if left:
        raise click.ClickException(f"{left} in doubt{'' if resolve else '; add --resolve to end them so'}.")
    if not found.ours:
        click.echo("nothing of this app in doubt" if found.foreign else "nothing in doubt")


def _on_engines(databases: Mapping[str, Any], work: Callable[[Mapping[str, Engine]], Result]) -> Result:
    return on_their_loop(databases.values(), lambda: work({name: one.engine for name, one in databases.items()}))


def _look(databases: Mapping[str, Any]) -> in_doubt.Findings:
    try:
        return _on_engines(databases, in_doubt.look)
    except (DBAPIError, CeleryAlchemyError) as error:
        reason = error.orig if isinstance(error, DBAPIError) else error
        raise click.ClickException(f"The prepared transactions cannot be listed: {reason}") from error


def _end(databases: Mapping[str, Any], found: list[in_doubt.InDoubt], *, resolve: bool) -> int:
    """Print each, end it if asked, and return how many are left."""
    left = 0
    for one in found:
        click.echo(f"{one.database}: {one.name}: {one.why}")
        if not resolve:
            left += 1
            continue
        try:
            ended = _on_engines(databases, functools.partial(in_doubt.resolve, one=one))
            said = "done" if ended else "not done: not decided yet, or the worker's connection still has it"
        except (DBAPIError, CeleryAlchemyError) as error:
            ended, said = False, f"not done: {error.orig if isinstance(error, DBAPIError) else error}"
        left += not ended
        click.echo(f"  {said}")
    return left
