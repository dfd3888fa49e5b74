"""The Celery app the workers run: `celery -A celery_alchemy.loadtests.app worker --pool=...`.

The same task names whatever the pattern. No Alchemy serves the app but where the pattern is ours: a baseline must not
profit from what an Alchemy does for the process.
"""

from __future__ import annotations

from celery import Celery
from celery.signals import worker_init

from celery_alchemy import Alchemy

from . import reporting
from .environment import WorkerEnvironment
from .faults.tasks import USE
from .patterns import OURS, PATTERNS
from .ticker import Ticker

environment = WorkerEnvironment.from_environ()
pattern = PATTERNS[environment.pattern]

app = Celery("celery-alchemy-loadtests", include=[pattern.module])
app.conf.update(environment.celery_settings() | environment.result_settings())
app.steps["consumer"].add(Ticker)

if pattern.name == OURS:
    app.conf.alchemy_database_url = environment.database_url
    # "auto" would measure a busy machine, and differ from start to start; `loadtests.first_statement` compares both.
    app.conf.alchemy_begin_with_first_statement = False
    db = Alchemy(app)

if environment.used_in_main:

    @worker_init.connect
    def use_in_main(**_: object) -> None:
        """Do what code at import time does: leave a connection in the main process."""
        app.tasks[USE.task_name](0)


reporting.connect(
    environment.reply_url,
    environment.ready_key,
    environment.reply_key,
    pattern=None if pattern.name == OURS else pattern,
)
