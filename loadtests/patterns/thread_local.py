"""A scoped_session with SQLAlchemy's own registry, one Session per thread, removed after each task."""

from __future__ import annotations

from typing import Any

from celery import Task
from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker

from .. import phases
from ..app import app, environment
from ..observation import every_workload, options, run
from ..workloads import Workload

engine = phases.instrument(create_engine(environment.database_url))
session = scoped_session(sessionmaker(bind=engine))


@every_workload
def define(workload: Workload) -> None:
    """Register the task of a workload."""

    @app.task(**options(workload))
    def task(self: Task, *args: Any, **kwargs: Any) -> Any:
        try:
            result = run(workload, session, self, args, kwargs)
            session.commit()
            return result
        finally:
            session.remove()
