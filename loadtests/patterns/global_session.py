"""One Session for all tasks of the process, as in a script."""

from __future__ import annotations

from typing import Any

from celery import Task
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from .. import phases
from ..app import app, environment
from ..observation import every_workload, options, run
from ..workloads import Workload

engine = phases.instrument(create_engine(environment.database_url))
session = Session(engine)


@every_workload
def define(workload: Workload) -> None:
    """Register the task of a workload."""

    @app.task(**options(workload))
    def task(self: Task, *args: Any, **kwargs: Any) -> Any:
        try:
            result = run(workload, session, self, args, kwargs)
            session.commit()
            return result
        except Exception:
            session.rollback()
            raise
