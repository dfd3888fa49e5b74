"""The Celery app the workers run: `celery -A celery_alchemy.loadtests.tasks.app worker --pool=...`.

The same task names whatever the pattern. No Alchemy serves the app but where the pattern is ours: a baseline must not
profit from what an Alchemy does for the process.
"""

from __future__ import annotations

import asyncio
from inspect import iscoroutine
from typing import Any

from celery import Celery, bootsteps
from celery.signals import worker_init

from .. import reporting
from ..faults.tasks import USE
from ..services.environment import WorkerEnvironment
from . import observation
from .patterns import AWAITED, OURS, PATTERNS, Pattern

TICK_S = 0.05


class Ticker(bootsteps.StartStopStep):  # type: ignore[misc]
    """Fires an empty timer, so that the worker's event loop does not sleep over work that is there.

    With no timer due soon, Celery's event loop can wait for seconds although there is a task to fetch. Runs of 200
    transfers that stalled, without and with a timer of 50 ms:

    - Celery 5.5.0, kombu 5.5.4, Redis, threads: 7 of 7 (14 transfers sent in 10 s), and 0 of 3. With 5.7: 0 of 6.
    - Celery 5.7.0, kombu 5.7.0, RabbitMQ, solo: 10 of 18, and 0 of 6. Also without retries (1 of 6), and with a
      hand-written task class instead of ours (1 of the 18). The reason inside Celery was not traced.

    Drop this when neither is seen any more.
    """

    def start(self, parent: Any) -> None:
        """Start ticking; the timer ends with the worker."""
        parent.timer.call_repeatedly(TICK_S, lambda: None)


environment: WorkerEnvironment = WorkerEnvironment.from_environ()
pattern: Pattern = PATTERNS[environment.pattern]

app: Celery = Celery("celery-alchemy-loadtests")
app.conf.update(environment.celery_settings())
app.steps["consumer"].add(Ticker)

assert pattern.build, f"{pattern.name} has a worker of its own"
observation.register(app, pattern.build(app, environment.database_url))

if environment.used_in_main:

    @worker_init.connect
    def use_in_main(**_: object) -> None:
        """Do what code at import time does: leave a connection in the main process."""
        found = app.tasks[USE.task_name](0)
        if iscoroutine(found):
            asyncio.run(found)


reporting.connect(
    environment.reply_url,
    environment.ready_key,
    environment.reply_key,
    pattern=None if pattern.name in {OURS, AWAITED} else pattern,
)
