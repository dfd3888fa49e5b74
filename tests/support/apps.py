"""Celery apps for tests that need no worker."""

from typing import Any

from celery import Celery

from celery_alchemy import Alchemy
from support import everywhere


class Isolated(Celery):
    """An app that keeps its tasks to itself: Celery gives each new app of a process the tasks of all others."""

    def task(self, *args: Any, **options: Any) -> Any:
        return super().task(*args, **{"shared": False} | options)


def make_app(database_url: str | None, **options: Any) -> tuple[Celery, Alchemy]:
    """Return an app with a database, and its Alchemy."""
    changes = everywhere.SETTINGS | options.pop("changes", {})
    app = Isolated("isolated", broker="memory://", set_as_current=False, changes=changes, **options)
    if database_url is not None:
        app.conf.alchemy_database_url = database_url
    return app, Alchemy(app)
