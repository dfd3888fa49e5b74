"""A COMMIT that comes when the result is stored."""

import os

from celery import Celery, signals

from celery_alchemy import Alchemy, DatabaseTask

app = Celery("shop", broker="redis://localhost")
app.conf.alchemy_database_url = os.environ["DOCTOR_URL"]
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)

db = Alchemy(app)


@app.task(base=DatabaseTask, bind=True)
def create(self, name):
    self.db.flush()


@signals.task_postrun.connect
def commit_after_task(task_id, **_):
    db.session.commit()
