"""An Engine that crosses the fork."""

import os

from celery import Celery
from sqlalchemy import create_engine, text

app = Celery("shop", broker="redis://localhost")
engine = create_engine(os.environ["DOCTOR_URL"])
with engine.connect() as first:
    first.execute(text("SELECT 1"))


@app.task
def create(name):
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
