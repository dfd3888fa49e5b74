"""The Celery app the workers run: `celery -A celery_alchemy.loadtests.tasks.app worker --pool=...`.

The same task names whatever the pattern. No Alchemy serves the app but where the pattern is ours: a baseline must not
profit from what an Alchemy does for the process.
"""

from __future__ import annotations

from celery import Celery
from celery.signals import worker_init

from .. import reporting
from ..faults.tasks import USE
from ..services.environment import WorkerEnvironment
from . import observation
from .patterns import OURS, PATTERNS, Pattern
from .ticker import Ticker

environment: WorkerEnvironment = WorkerEnvironment.from_environ()
pattern: Pattern = PATTERNS[environment.pattern]

app: Celery = Celery("celery-alchemy-loadtests")
app.conf.update(environment.celery_settings() | environment.result_settings())
app.steps["consumer"].add(Ticker)

assert pattern.build, f"{pattern.name} has a worker of its own"
observation.register(app, pattern.build(app, environment.database_url))

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
