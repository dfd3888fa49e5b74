"""`with Session(engine)` in each task, on an Engine that keeps no connection: the usual advice against forks."""

from __future__ import annotations

from typing import Any

from celery import Task
from sqlalchemy import NullPool, create_engine
from sqlalchemy.orm import Session

from .. import phases
from ..app import app, environment
from ..observation import every_workload, options, run
from ..workloads import Workload

engine = phases.instrument(create_engine(environment.database_url, poolclass=NullPool))


@every_workload
def define(workload: Workload) -> None:
    """Register the task of a workload."""

    @app.task(**options(workload))
    def task(self: Task, *args: Any, **kwargs: Any) -> Any:
        with Session(engine) as session, session.begin():
            return run(workload, session, self, args, kwargs)
