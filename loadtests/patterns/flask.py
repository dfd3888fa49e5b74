"""Flask-SQLAlchemy's `db.session`, in an application context around each task.

Source: Flask, "Background Tasks with Celery"; Flask-SQLAlchemy, "Flask Application Context".
"""

from __future__ import annotations

from typing import Any

from celery import Task
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from .. import phases
from ..app import app, environment
from ..observation import every_workload, options, run
from ..workloads import Workload

flask_app = Flask(__name__)
flask_app.config["SQLALCHEMY_DATABASE_URI"] = environment.database_url
db = SQLAlchemy()
db.init_app(flask_app)

with flask_app.app_context():
    phases.instrument(db.engine)


class FlaskTask(Task):  # type: ignore[misc]
    """As in Flask's documentation."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task in an application context, which removes the Session when it ends."""
        with flask_app.app_context():
            return self.run(*args, **kwargs)


@every_workload
def define(workload: Workload) -> None:
    """Register the task of a workload."""

    @app.task(base=FlaskTask, **options(workload))
    def task(self: Task, *args: Any, **kwargs: Any) -> Any:
        result = run(workload, db.session, self, args, kwargs)
        db.session.commit()
        return result
