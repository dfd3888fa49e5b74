"""A task of the user's own, found through `celery -A`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..databases import DRIVERS
from .arguments import suggest


@dataclass(frozen=True, slots=True)
class UserTask:
    """A task of somebody else's app, to be measured as it is."""

    app: str
    """As in `celery -A`."""
    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    broker_url: str
    environ: dict[str, str]
    """What its worker needs: the broker, if that is not the one its app knows."""
    database_url: URL | None
    """What its connections are counted on; None if it is not known, or no server whose connections can be counted."""
    alchemy: bool
    """Whether the app has an Alchemy: strategies can be chosen then."""


def find_user_task(
    ctx: click.Context, *, task: str, args: list[Any], kwargs: dict[str, Any], broker_url: str | None,
    database_url: str | None, **_: Any,
) -> UserTask:  # fmt: skip
    """Return the task, looked up in the app.

    Raises:
        click.UsageError: There is no app, or no such task in it.
    """
    name = ctx.find_root().params.get("app")
    if not isinstance(name, str):
        raise click.UsageError("--task needs the app that has it: celery -A proj alchemy bench --task proj.tasks.name")
    app = ctx.obj.app
    app.loader.import_default_modules()
    app.finalize()
    if task not in app.tasks:
        known = [known for known in sorted(app.tasks) if not known.startswith("celery.")]
        raise click.BadParameter(f"{name} has no task {task!r}. {suggest(task, known)}", param_hint="--task")
    url = database_url or app.conf.get("alchemy_database_url")
    given = broker_url or None
    broker = given or app.conf.broker_url
    if not broker:
        raise click.UsageError(f"The app {name} has no broker_url: give one with --broker-url.")
    return UserTask(
        name, task, args, kwargs,
        broker_url=broker if isinstance(broker, str) else broker[0],
        environ={"CELERY_BROKER_URL": given} if given else {},
        database_url=_observable(url),
        alchemy=_has_alchemy(app),
    )  # fmt: skip


def _observable(url: str | URL | None) -> URL | None:
    try:
        found = make_url(url) if url else None
    except ArgumentError:
        return None
    return found if found is not None and found.drivername in DRIVERS else None


def _has_alchemy(app: Any) -> bool:
    from ...workers import apps

    return apps.find(app) is not None
