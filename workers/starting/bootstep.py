"""The bootstep that chooses the strategy, from the worker itself, and stops a worker that cannot be right."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from celery import bootsteps

from ...strategies import SessionStrategy
from ...strategies.features import completed_table, outbox
from .. import apps, isolation
from ..asyncio_pool import beside
from ..databases import check_two_phase
from ..errors import ConfigurationError, as_configuration_error
from ..exactly_once import choosing as once
from ..sending.outbox import RELAY
from ..watching import control, growth, processes  # `control` registers the remote-control commands
from ..watching.idle_watch import IdleWatch
from . import asynchronous, checks, detection, signals

__all__ = ["SessionStrategyStep", "control"]

logger: logging.Logger = logging.getLogger(__name__)


class SessionStrategyStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Worker bootstep: learns the worker pool from the worker, and lets the Alchemy choose and prepare its strategy.

    It runs after the pool object is made and before it forks or consumes. An exception here ends the worker with a
    non-zero exit code; one in a signal handler would only be logged.
    """

    label: str = "SessionStrategy"
    requires: tuple[str, ...] = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, session_strategy: str | None = None, **options: Any) -> None:
        self._strategy_name = session_strategy
        self._watch: IdleWatch | None = None
        super().__init__(worker, **options)

    def create(self, worker: Any) -> None:
        try:
            self._create(worker)
        except ConfigurationError as error:
            # A detached worker has a log and no terminal.
            logger.critical("%s", error)
            error.logged = _logs_to_terminal()
            raise

    def _create(self, worker: Any) -> None:
        db = apps.find(worker.app)
        if db is None:
            checks.refuse_tasks_without_alchemy(worker.app)
            return
        worker_pool = detection.detect(worker)
        db.start_worker(worker_pool, self._strategy_name)  # first: it reads the settings again, `databases` among them
        databases = db.databases
        for one in databases.values():
            if one is not db:
                one.start_worker(worker_pool, self._strategy_name)
        strategies = {name: one.strategy for name, one in databases.items()}
        lines = asynchronous.start(worker.app, databases, worker_pool)
        if lines:
            beside.take_off(worker.app)
        reads = any(getattr(task, "read_only", False) is True for task in worker.app.tasks.values())
        for strategy in strategies.values():
            strategy.reads_apart = reads
        check_two_phase(databases)
        checks.refuse_mistakes(worker.app, databases)
        once.prepare_worker(worker.app, db.settings)
        if worker_pool.tasks_per_process > 1:
            once.prepare_threads(worker.app, db.settings)
            isolation.prepare_threads(worker.app.tasks.values(), db.settings.isolation_retries)
        if worker_pool.forks:
            detection.publish(
                worker_pool,
                {name: f"{type(one).__module__}:{type(one).__qualname__}" for name, one in strategies.items()},
                processes.begin(spawns=worker_pool.start_method == "spawn"),
            )
        pool = f"celery-alchemy in pid {os.getpid()}: worker pool {worker_pool.name}, concurrency"
        for name, strategy in strategies.items():
            which = f"database {name!r}: " if len(strategies) > 1 else ""
            logger.info("%s %s; %s%s", pool, worker_pool.concurrency, which, strategy.describe())
        for line in lines:
            logger.info("%s", line)
        if len(strategies) > 1:
            logger.info("%s", _together(strategies, two_phase=db.settings.two_phase))
        if db.settings.outbox:
            _tell_of_outbox(db)
        if by := once.needs_table(worker.app, db.settings):
            _tell_of_completed(db, by)
        growth.watch(db, worker)
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
        signals.stop(worker.app)


def _tell_of_outbox(db: apps.Served) -> None:
    """Say what the outbox needs and does not have by itself: its table, and with "relay" a sender."""
    with as_configuration_error():
        why = outbox.undeclared(db.settings.outbox_table)
    if why is not None:
        logger.warning(
            "alchemy_outbox is on, but %s. If the database has no such table, every transaction that sends "
            "something fails: create it (%s). `celery alchemy doctor` looks.", why, outbox.HOW_TO_CREATE
        )  # fmt: skip
    if db.settings.outbox == RELAY:
        logger.info(
            "alchemy_outbox = 'relay': what waits for a COMMIT is sent by `celery -A ... alchemy outbox run` alone. "
            "Run it beside the workers; `celery -A ... inspect sessions` shows for how long the oldest message waits."
        )


def _tell_of_completed(db: apps.Served, by: str) -> None:
    with as_configuration_error():
        why = completed_table.undeclared(db.settings.completed_table)
    if why is not None:
        logger.warning(
            "%s, but %s. If the database has no such table, every such task fails: create it (%s). "
            "`celery alchemy doctor` looks.", by, why, completed_table.HOW_TO_CREATE
        )  # fmt: skip


def _logs_to_terminal() -> bool:
    """Tell whether what is logged here is seen by whoever has typed the command."""
    at: logging.Logger | None = logger
    while at is not None:
        if any(getattr(handler, "stream", None) in {sys.__stderr__, sys.__stdout__} for handler in at.handlers):
            return True
        at = at.parent if at.propagate else None
    return False


def _together(strategies: dict[str, SessionStrategy], *, two_phase: bool) -> str:
    """Say what the databases are together: connections, and how they commit."""
    limits = [strategy.max_connections for strategy in strategies.values()]
    most = "no limit on" if None in limits else f"at most {sum(limit or 0 for limit in limits)}"
    names = [repr(name) for name in strategies]
    order = ", ".join([*names[1:], names[0]])
    how = "all or none (two-phase)" if two_phase else f"one after another: {order}"
    return f"celery-alchemy: {most} connections to {len(names)} databases together; a unit of work commits {how}"
