"""A scoped_session that nobody removes."""

import os

from celery import Celery
from sqlalchemy.orm import scoped_session, sessionmaker

from celery_alchemy import Alchemy, DatabaseTask

app = Celery("shop", broker="redis://localhost")
app.conf.alchemy_database_url = os.environ["DOCTOR_URL"]
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)

db = Alchemy(app)
DBSession = scoped_session(sessionmaker())


@app.task(base=DatabaseTask)
def create(name):
    DBSession.flush()
