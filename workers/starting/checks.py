"""What is looked at when a worker starts, and stops it where it cannot be right."""

from __future__ import annotations

from celery import Celery

from ...strategies.names import counted
from .. import apps
from ..attributes import without_effect
from ..databases import Databases
from ..errors import ConfigurationError
from ..injection import injected_parameters
from ..wrapping import injected_places, is_database_task


def refuse_tasks_without_alchemy(app: Celery) -> None:
    names = sorted(name for name, task in app.tasks.items() if is_database_task(task))
    own = [name for name in names if not name.startswith("celery.")]
    if names:
        shown = ", ".join(own[:3] or names[:3])
        raise ConfigurationError(
            f"{counted(len(own or names), 'DatabaseTask')} ({shown}) in this app, but {apps.explain_none(app)}"
        )


def refuse_mistakes(app: Celery, databases: Databases) -> None:
    """Refuse tasks that would fail with every call, or not do what their definition says.

    Raises:
        ConfigurationError: names the task and the remedy.
    """
    refuse_what_only_a_database_task_has(app)
    refuse_unknown_databases(app, databases)


def refuse_what_only_a_database_task_has(app: Celery) -> None:
    """Refuse a task that wants a Session for a parameter, or has attributes of ours, and is no DatabaseTask."""
    for name, task in sorted(app.tasks.items()):
        if is_database_task(task):
            continue
        if places := injected_parameters(task.run):
            what = f"wants a Session for its parameter {next(iter(places))!r}"
        elif (attributes := without_effect(task)) and not app.conf.task_annotations:  # those are for all tasks
            what = f"has the attribute {attributes[0]!r}"
        else:
            continue
        raise ConfigurationError(
            f"The task {name} {what}, which only a DatabaseTask gets. Give it a base: "
            f"`@app.task(base=DatabaseTask)`, or derive its class from DatabaseTask."
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
