"""One Session for all tasks."""

import os

from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

app = Celery("shop", broker="redis://localhost")
session = Session(create_engine(os.environ["DOCTOR_URL"]))


@app.task
def create(name):
    session.commit()
