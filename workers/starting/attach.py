"""From worker start to shutdown: the bootstep that chooses the strategy, and the signals that close connections."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import click
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, bootsteps, signals
from celery.app import base as celery_base

from ...strategies import SessionStrategy
from ...strategies.interrupts import register_interrupt
from ...strategies.watching.activity import activities
from .. import apps
from ..databases import Databases, check_two_phase
from ..errors import ConfigurationError
from ..secrecy import mask_reports
from ..selection import OPTION
from ..sending import enqueue
from ..watching import boards, metrics
from ..watching.idle_watch import IdleWatch
from ..wrapping import injected_places
from . import detection

logger = logging.getLogger(__name__)


class SessionStrategyStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Worker bootstep: learns the worker pool from the worker, and lets the Alchemy choose and prepare its strategy.

    It runs after the pool object is made and before it forks or consumes. An exception here ends the worker with a
    non-zero exit code; one in a signal handler would only be logged.
    """

    label = "SessionStrategy"
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, session_strategy: str | None = None, **options: Any) -> None:
        self._strategy_name = session_strategy
        self._watch: IdleWatch | None = None
        super().__init__(worker, **options)

    def create(self, worker: Any) -> None:
        try:
            self._create(worker)
        except ConfigurationError as error:
            # The traceback that follows is long: say it first, and alone.
            logger.critical("%s", error)
            raise

    def _create(self, worker: Any) -> None:
        db = apps.find(worker.app)
        if db is None:
            _refuse_tasks_without_alchemy(worker.app)
            return
        worker_pool = detection.detect(worker)
        db.start_worker(worker_pool, self._strategy_name)  # first: it reads the settings again, `databases` among them
        databases = db.databases
        for one in databases.values():
            if one is not db:
                one.start_worker(worker_pool, self._strategy_name)
        strategies = {name: one.strategy for name, one in databases.items()}
        reads = any(getattr(task, "read_only", False) is True for task in worker.app.tasks.values())
        for strategy in strategies.values():
            strategy.reads_apart = reads
        check_two_phase(databases)
        check_injected(worker.app, databases)
        from ..watching import control  # noqa: F401 - registers the remote-control commands

        if worker_pool.forks:
            boards.make()
            detection.publish(
                worker_pool,
                {name: f"{type(one).__module__}:{type(one).__qualname__}" for name, one in strategies.items()},
            )
        pool = f"celery-alchemy in pid {os.getpid()}: worker pool {worker_pool.name}, concurrency"
        for name, strategy in strategies.items():
            which = f"database {name!r}: " if len(strategies) > 1 else ""
            logger.info("%s %s; %s%s", pool, worker_pool.concurrency, which, strategy.describe())
        if len(strategies) > 1:
            logger.info("%s", _together(strategies, two_phase=db.settings.two_phase))
        if db.settings.metrics is not None:
            metrics.start(db.settings.metrics)
        if db.settings.warn_idle_s is not None:
            self._watch = IdleWatch(db.settings.warn_idle_s)

    def start(self, worker: Any) -> None:
        """Begin to watch; the first statement of the first task connects."""
        if self._watch is not None:
            self._watch.start(worker)

    def stop(self, worker: Any) -> None:
        """Watch no more. The pool's tasks still run; the signal worker_shutdown comes after them."""
        if self._watch is not None:
            self._watch.stop()

    def terminate(self, worker: Any) -> None:
        """Close what is idle: worker_shutdown is not sent after a cold shutdown."""
        self.stop(worker)
        _stop(worker.app)


def _together(strategies: dict[str, SessionStrategy], *, two_phase: bool) -> str:
    """Say what the databases are together: connections, and how they commit."""
    limits = [strategy.max_connections for strategy in strategies.values()]
    most = "no limit on" if None in limits else f"at most {sum(limit or 0 for limit in limits)}"
    names = [repr(name) for name in strategies]
    order = ", ".join([*names[1:], names[0]])
    how = "all or none (two-phase)" if two_phase else f"one after another: {order}"
    return f"celery-alchemy: {most} connections to {len(names)} databases together; a unit of work commits {how}"


def _refuse_tasks_without_alchemy(app: Celery) -> None:
    from ..task import DatabaseTask

    names = sorted(name for name, task in app.tasks.items() if isinstance(task, DatabaseTask))
    own = [name for name in names if not name.startswith("celery.")]
    if names:
        shown = ", ".join(own[:3] or names[:3])
        raise ConfigurationError(
            f"{len(own or names)} task(s) are DatabaseTasks ({shown}), but {apps.explain_none(app)}"
        )


def check_injected(app: Celery, databases: Databases) -> None:
    """Refuse a task that asks for the Session of a database that is none of the app's."""
    for name, task in app.tasks.items():
        for place in injected_places(task.run):
            if place.database not in databases:
                try:
                    databases[place.database]
                except ConfigurationError as error:
                    raise ConfigurationError(f"The parameter {place.name!r} of the task {name}: {error}") from None


def attach(app: Celery) -> None:
    """Add the bootstep, the command-line option and the sending on commit to `app`, once, and connect the signals, once
    per process."""
    enqueue.attach(app)
    mask_reports()
    if "celery.worker.control" in sys.modules:  # a worker, or `celery inspect`, which refuses what it does not know
        from ..watching import control  # noqa: F401
    app.steps["worker"].add(SessionStrategyStep)
    options = app.user_options["worker"]
    if not any(OPTION in getattr(option, "opts", ()) for option in options):
        options.add(
            click.Option(
                [OPTION],
                metavar="NAME",
                help="Session strategy of celery-alchemy: auto, local, scoped, per_process or package.module:Class. "
                "Overrides the setting alchemy_session_strategy.",
            )
        )
    register_interrupt(SoftTimeLimitExceeded)
    for signal, receiver in (
        (signals.worker_process_init, _on_process_init),
        (signals.worker_process_shutdown, _on_process_shutdown),
        (signals.worker_before_create_process, _on_before_create_process),
        (signals.worker_shutdown, _on_worker_shutdown),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"celery_alchemy.{receiver.__name__}")


def _on_process_init(**_: Any) -> None:
    boards.write_here()
    if activities.observer is None and detection.published() is not None:  # a forked one has its parent's
        for setting in {db.settings.metrics for db in apps.every() if db.app is not None}:
            if setting is not None:
                metrics.start(setting)
    # Forked pool processes know all they need. A spawned one starts from nothing: there is no worker_init, no bootstep.
    # The signal also fires in solo's one process, which is no pool process.
    if not celery_base.USING_EXECV and not os.environ.get("FORKED_BY_MULTIPROCESSING"):
        return
    found = detection.published()
    if found is None:
        return
    worker_pool, strategies = found
    if os.getpid() == worker_pool.main_pid:
        return
    for app_db in apps.every():
        for name, db in app_db.databases.items():
            db.start_spawned(worker_pool, strategies.get(name))


def _on_before_create_process(**_: Any) -> None:
    for db in apps.every():
        db.close_before_fork()


def _on_process_shutdown(**_: Any) -> None:
    # atexit never runs in a pool process.
    for db in apps.every():
        db.stop()


def _on_worker_shutdown(sender: Any = None, **_: Any) -> None:
    if sender is not None:
        _stop(sender.app)


def _stop(app: Celery) -> None:
    if apps.find(app) is not None:
        detection.withdraw()
        boards.remove()
    for db in apps.databases(app).values():
        db.stop()
