"""A task that wants a database which is none of the app's."""

import os
from typing import Annotated

from celery import Celery
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, DatabaseTask, UseDatabase

app = Celery("shop", broker="redis://localhost")
app.conf.alchemy_database_url = os.environ["DOCTOR_URL"]
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)

db = Alchemy(app)


@app.task(base=DatabaseTask)
def create(name, there: Annotated[Session, UseDatabase("reports")]): ...
