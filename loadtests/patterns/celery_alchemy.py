"""`self.db` of a DatabaseTask."""

from __future__ import annotations

from typing import Any

from celery_alchemy import DatabaseTask

from ..app import app
from ..observation import every_workload, options, run
from ..workloads import Workload


@every_workload
def define(workload: Workload) -> None:
    """Register the task of a workload."""

    @app.task(base=DatabaseTask, **options(workload))
    def task(self: DatabaseTask, *args: Any, **kwargs: Any) -> Any:
        return run(workload, self.db, self, args, kwargs)
