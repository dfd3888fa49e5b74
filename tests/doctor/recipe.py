"""The recipe that everybody writes by hand."""

import os

from celery import Celery, Task
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

app = Celery("shop", broker="redis://localhost")
engine = create_engine(os.environ["DOCTOR_URL"])
SessionLocal = sessionmaker(bind=engine)


class DatabaseTask(Task):
    abstract = True
    _session = None

    @property
    def db(self):
        if self._session is None:
            self._session = SessionLocal()
        return self._session

    def after_return(self, *args, **kwargs):
        if self._session is not None:
            self._session.close()


@app.task(base=DatabaseTask, bind=True)
def create(self, name):
    self.db.commit()
