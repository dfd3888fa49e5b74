"""An Engine beside the one that celery-alchemy has."""

import os

from celery import Celery
from sqlalchemy import create_engine, text

from celery_alchemy import Alchemy

app = Celery("shop", broker="redis://localhost")
app.conf.alchemy_database_url = os.environ["DOCTOR_URL"]
engine = create_engine(os.environ["DOCTOR_URL"])
db = Alchemy(app)
with engine.connect() as first:
    first.execute(text("SELECT 1"))


@app.task
def create(name):
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
