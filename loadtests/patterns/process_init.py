"""An Engine made in each pool process by `worker_process_init`: the other usual advice against forks."""

from __future__ import annotations

from typing import Any

from celery import Task
from celery.signals import worker_process_init
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from .. import phases
from ..app import app, environment
from ..observation import every_workload, options, run
from ..workloads import Workload

SessionLocal = sessionmaker()


@worker_process_init.connect
def make_engine(**_: Any) -> None:
    """Make the Engine of this process."""
    SessionLocal.configure(bind=phases.instrument(create_engine(environment.database_url)))


@every_workload
def define(workload: Workload) -> None:
    """Register the task of a workload."""

    @app.task(**options(workload))
    def task(self: Task, *args: Any, **kwargs: Any) -> Any:
        with SessionLocal() as session, session.begin():
            return run(workload, session, self, args, kwargs)
