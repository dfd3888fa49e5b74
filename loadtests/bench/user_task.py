"""A task of the user's own, found through `celery -A`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import click
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ...workers import apps
from ..services.databases import DRIVERS
from .arguments import suggest


@dataclass(frozen=True, slots=True)
class UserTask:
    """A task of somebody else's app, to be measured as it is."""

    app: str  # As in `celery -A`
    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    broker_url: str
    environ: dict[str, str]  # What its worker needs: the broker, if that is not the one its app knows
    database_url: URL | None
    """What its connections are counted on; None if it is not known, or no server whose connections can be counted."""
    alchemy: bool  # Whether the app has an Alchemy: strategies can be chosen then


def find_user_task(
    ctx: click.Context, *, task: str, args: list[Any], kwargs: dict[str, Any], broker_url: str | None,
    database_url: str | None, **_: Any,
) -> UserTask | None:  # fmt: skip
    """Return the task, looked up in the app; None if none is asked for.

    Raises:
        click.UsageError: There is no app, or no such task in it.
    """
    if not task:
        return None
    name = ctx.find_root().params.get("app")
    if not isinstance(name, str):
        raise click.UsageError("--task needs the app that has it: celery -A proj alchemy bench --task proj.tasks.name")
    app = ctx.obj.app
    app.loader.import_default_modules()
    app.finalize()
    if task not in app.tasks:
        known = [known for known in sorted(app.tasks) if not known.startswith("celery.")]
        raise click.BadParameter(f"{name} has no task {task!r}. {suggest(task, known)}", param_hint="--task")
    broker = broker_url or app.conf.broker_url
    if not broker:
        raise click.UsageError(f"The app {name} has no broker_url: give one with --broker-url.")
    url, environ = database_url or app.conf.get("alchemy_database_url"), dict[str, str]()
    with contextlib.suppress(ArgumentError):
        url = make_url(url) if url else None
    if broker_url:
        environ["CELERY_BROKER_URL"] = broker_url
    observable = url if isinstance(url, URL) and url.drivername in DRIVERS else None
    first = broker if isinstance(broker, str) else broker[0]
    return UserTask(name, task, args, kwargs, first, environ, observable, apps.find(app) is not None)
