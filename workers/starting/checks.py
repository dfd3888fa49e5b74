"""What is looked at when a worker starts, and stops it where it cannot be right."""

from __future__ import annotations

from celery import Celery

from .. import apps
from ..databases import Databases
from ..errors import ConfigurationError
from ..wrapping import injected_places


def refuse_tasks_without_alchemy(app: Celery) -> None:
    names = sorted(name for name, task in app.tasks.items() if hasattr(task, "apply_async_on_commit"))
    own = [name for name in names if not name.startswith("celery.")]
    if names:
        shown = ", ".join(own[:3] or names[:3])
        raise ConfigurationError(
            f"{len(own or names)} task(s) are DatabaseTasks ({shown}), but {apps.explain_none(app)}"
        )


def refuse_unknown_databases(app: Celery, databases: Databases) -> None:
    """Refuse a task that asks for the Session of a database that is none of the app's."""
    for name, task in app.tasks.items():
        for place in injected_places(task.run):
            if place.database not in databases:
                try:
                    databases[place.database]
                except ConfigurationError as error:
                    raise ConfigurationError(f"The parameter {place.name!r} of the task {name}: {error}") from None
