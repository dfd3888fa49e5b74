"""An embedded worker: arguments are its pool and a database URL, the last line of output is what came of it."""

import json
import sys
from typing import Any

from celery import Celery
from celery.contrib.testing.worker import start_worker
from sqlalchemy import func, select
from support.project.models import Base, User

from celery_alchemy import Alchemy, DatabaseTask

pool, url = sys.argv[1:]
app = Celery("embedded", broker="memory://", backend="cache+memory://")
app.conf.alchemy_database_url = url
db = Alchemy(app)


@app.task(base=DatabaseTask, bind=True)
def create(self: DatabaseTask, name: str) -> list[str]:
    self.db.add(User(name=name))
    self.db.commit()
    return [db.strategy.name, db.strategy.worker_pool.name]


Base.metadata.create_all(db.engine)
db.dispose()
report: dict[str, Any] = {}
with start_worker(app, pool=pool, concurrency=2, perform_ping_check=False):
    answers = [create.delay(name) for name in "abc"]
    values = [answer.get(timeout=20) for answer in answers]
    report["strategy"], report["worker_pool"] = values[0]
with db.unit_of_work() as session:
    report["rows"] = session.scalar(select(func.count(User.id)))
print(json.dumps(report))
