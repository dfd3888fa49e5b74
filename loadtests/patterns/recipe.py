"""The published DatabaseTask: the Session is an attribute of the Task, closed in `after_return`.

Sources: seatable/dtable-events:dtable_events/celery_app/tasks/base.py; sogo.dev/posts/2023/05/celery-sqlalchemy.
"""

from __future__ import annotations

from typing import Any

from celery import Task
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from .. import phases
from ..app import app, environment
from ..observation import every_workload, options, run
from ..workloads import Workload

engine = phases.instrument(create_engine(environment.database_url))
SessionLocal = sessionmaker(bind=engine)


class DatabaseTask(Task):  # type: ignore[misc]
    """As it is found in many projects."""

    abstract = True
    _session: Session | None = None

    @property
    def session(self) -> Session:
        """The Session of this task."""
        if self._session is None:
            self._session = SessionLocal()
        return self._session

    def after_return(self, *args: Any, **kwargs: Any) -> None:
        """Close the Session."""
        if self._session is not None:
            self._session.close()
            self._session = None


@every_workload
def define(workload: Workload) -> None:
    """Register the task of a workload."""

    @app.task(base=DatabaseTask, **options(workload))
    def task(self: DatabaseTask, *args: Any, **kwargs: Any) -> Any:
        result = run(workload, self.session, self, args, kwargs)
        self.session.commit()
        return result
