"""DatabaseTasks without an Alchemy."""

from celery import Celery

from celery_alchemy import DatabaseTask

app = Celery("shop", broker="redis://localhost")


@app.task(base=DatabaseTask, bind=True)
def create(self, name):
    self.db.flush()
