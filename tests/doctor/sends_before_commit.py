"""A task that runs before its row is committed."""

import os

from celery import Celery
from sqlalchemy import text

from celery_alchemy import Alchemy, DatabaseTask

app = Celery("shop", broker="redis://localhost")
app.conf.alchemy_database_url = os.environ["DOCTOR_URL"]
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)

db = Alchemy(app)


@app.task(base=DatabaseTask, bind=True)
def create(self, name):
    self.db.execute(text("INSERT INTO users (name) VALUES (:name)"), {"name": name})
    welcome.delay(name)


@app.task(base=DatabaseTask)
def welcome(name): ...
