"""Settings that the test gives."""

import json
import os

from celery import Celery

from celery_alchemy import Alchemy, DatabaseTask

app = Celery("shop", broker="redis://localhost")
app.conf.alchemy_database_url = os.environ["DOCTOR_URL"]
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)

app.conf.update(json.loads(os.environ["DOCTOR_SETTINGS"]))
if "poolclass" in app.conf.get("alchemy_engine_options", {}):
    from sqlalchemy.pool import NullPool

    app.conf.alchemy_engine_options = {"poolclass": NullPool}
db = Alchemy(app)


@app.task(base=DatabaseTask, bind=True, time_limit=app.conf.get("shop_time_limit"))
def create(self, name):
    self.db.flush()
