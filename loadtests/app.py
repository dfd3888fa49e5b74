"""The Celery app the workers run: `celery -A celery_alchemy.loadtests.app worker --pool=...`."""

from __future__ import annotations

from celery import Celery

from celery_alchemy import Alchemy

from . import signals
from .environment import WorkerEnvironment
from .ticker import Ticker

environment = WorkerEnvironment.from_environ()

app = Celery("celery-alchemy-loadtests", include=["celery_alchemy.loadtests.tasks"])
app.conf.update(environment.celery_settings())
app.conf.alchemy_database_url = environment.database_url

app.steps["consumer"].add(Ticker)

db = Alchemy(app)
signals.connect(db, environment)
