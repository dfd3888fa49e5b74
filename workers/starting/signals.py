"""The signals of Celery that close connections, and tell pool processes what they are."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, signals

from ...strategies.asynchronous import loop_thread
from .. import apps
from .._celery import is_spawned
from ..asyncio_pool import beside
from ..plain_tasks import explain_failure
from ..watching import growth, processes
from . import detection


def connect() -> None:
    """Connect the signals, once per process."""
    for signal, receiver in (
        (signals.worker_process_init, _on_process_init),
        (signals.worker_process_shutdown, _on_process_shutdown),
        (signals.worker_before_create_process, _on_before_create_process),
        (signals.worker_shutdown, _on_worker_shutdown),
        (signals.task_failure, explain_failure),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"celery_alchemy.{receiver.__name__}")


def _on_process_init(**_: Any) -> None:
    processes.answer_here()
    # Forked pool processes know all they need. A spawned one starts from nothing: there is no worker_init, no bootstep.
    # The signal also fires in solo's one process, which is no pool process.
    if not is_spawned() and not os.environ.get("FORKED_BY_MULTIPROCESSING"):
        return
    found = detection.published()
    if found is None:
        return
    worker_pool, strategies, asks_at = found
    if os.getpid() == worker_pool.main_pid:
        return
    if asks_at is not None:
        processes.answer_at(asks_at)
    for app_db in apps.every():
        beside.take_off(app_db.app)
        for name, db in app_db.databases.items():
            db.start_spawned(worker_pool, strategies.get(name))


def _on_before_create_process(**_: Any) -> None:
    growth.look()
    processes.before_fork()
    for db in apps.every():
        db.close_before_fork()


def _on_process_shutdown(**_: Any) -> None:
    # atexit never runs in a pool process.
    for db in apps.every():
        db.stop()
    loop_thread.stop()


def _on_worker_shutdown(sender: Any = None, **_: Any) -> None:
    if sender is not None:
        stop(sender.app)


def stop(app: Celery) -> None:
    """Close idle connections of `app`: its worker is over."""
    if apps.find(app) is not None:
        detection.withdraw()
        processes.end()
    for db in apps.databases(app).values():
        db.stop()
    beside.leave(app)
    loop_thread.stop()
