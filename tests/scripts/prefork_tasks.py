"""Tasks of the tests' project for real prefork workers whose main process uses the database too.

FORKS_USE says when the main process does: at `import`, in `worker_init`, when `ready`, or, with FORKS_HOLD as the key
of its row, with a transaction that it opens at import and commits at shutdown.
"""

import os
import time
from typing import Any

from celery.signals import worker_init, worker_ready, worker_shutdown
from sqlalchemy import Engine, event, insert, text
from support.project import tools
from support.project.app import app, db, task
from support.project.models import Row

from celery_alchemy import DatabaseTask

use = os.environ.get("FORKS_USE", "")
hold = os.environ.get("FORKS_HOLD")


@db.on_engine
def listen(engine: Engine) -> None:
    event.listen(engine, "connect", say_who_listened)


def say_who_listened(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET forks.listener = '{os.getpid()}'")
    cursor.close()
    connection.commit()


def use_engine(**_: Any) -> None:
    with db.engine.connect() as connection:
        connection.execute(text("SELECT 1"))


if "import" in use:
    use_engine()
if "worker_init" in use:
    worker_init.connect(use_engine, weak=False)
if "ready" in use:
    worker_ready.connect(use_engine, weak=False)
if hold:
    held = db.engine.connect()
    held.execute(insert(Row).values(key=hold, note="main process"))

    @worker_shutdown.connect
    def commit_held(**_: Any) -> None:
        held.commit()
        held.close()


@task()
def work(self: Any, key: str, note: str, parties: int = 0) -> dict[str, Any]:
    """Write a row in each of two transactions; return which process and which connections did it."""
    backends = []
    for part in ("first", "second"):
        self.db.add(Row(key=key, note=f"{note} {part}"))
        backends.append(self.db.scalar(text("SELECT pg_backend_pid()")))
        self.db.commit()
    listener = int(self.db.scalar(text("SELECT current_setting('forks.listener')")))
    if parties:
        tools.barrier(key, parties)
    return {"note": note, "pid": os.getpid(), "main": os.getppid(), "backends": backends, "listener": listener}


@task()
def let_go(self: Any, key: str) -> None:
    """Do to what the main process holds what a child must not."""
    import gc

    self.db.add(Row(key=key, note="child"))
    globals().pop("held").close()
    gc.collect()


@app.task(bind=True)
def restart_pool(self: Any) -> None:
    """Ask the worker this runs in to restart its worker pool."""
    app.control.broadcast("pool_restart", arguments={"reload": False}, destination=[self.request.hostname])


class Journal(DatabaseTask):
    abstract = True

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.db.add(Row(key=args[0], note=f"on_failure in {os.getpid()}"))


@app.task(base=Journal, bind=True)
def hung(self: Any, key: str) -> None:
    """Wait for the hard time limit, in the middle of a transaction."""
    self.db.add(Row(key=key, note="lost"))
    self.db.flush()
    time.sleep(60)


@app.task(base=DatabaseTask)
def errback(request: Any, exc: Any, traceback: Any) -> None:
    """Celery calls an error callback with these parameters, unbound, where the failure is noticed."""
    db.session.add(Row(key=request.args[0], note=f"errback in {os.getpid()}"))
