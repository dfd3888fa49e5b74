"""The Celery app of the project, configured by one environment variable."""

import functools
import json
import os
from typing import Any

from celery import Celery
from celery.signals import (
    after_task_publish,
    before_task_publish,
    task_failure,
    task_postrun,
    task_prerun,
    task_success,
    worker_ready,
)
from sqlalchemy import Engine, create_engine, event

from celery_alchemy import Alchemy, AsyncDatabaseTask, DatabaseTask
from celery_alchemy.strategies.interrupts import shield
from support.project import spelling, tools
from support.project.models import Row

config: dict[str, Any] = json.loads(os.environ["CONTRACT_PROJECT"])


class Project(Celery):
    """Tasks are called by the name of their function."""

    def gen_task_name(self, name: str, module: str) -> str:
        return name


app = Project("project", broker=config["broker_url"], backend=config["result_backend"])
app.conf.update(
    include=[f"support.project.{name}" for name in config["modules"]],
    task_default_queue=config["queue"],
    broker_transport_options=config["broker_transport_options"],
    result_backend_transport_options={"global_keyprefix": config["prefix"]},
    result_expires=600,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    worker_proc_alive_timeout=60,  # a spawned pool process imports everything, on a busy machine for longer than 4 s
)
app.conf.update(config["settings"])

user_engine = create_engine(config["database_url"]) if config["brings_engine"] else None
if user_engine is not None:
    tools.use(user_engine)  # as code at import time does: a connection is in the parent's pool when it forks
db = Alchemy(app, engine=user_engine)
task = functools.partial(app.task, base=AsyncDatabaseTask if config["awaits"] else DatabaseTask, bind=True)
if config["awaits"]:
    spelling.install(app.conf.include)


listened: list[Engine] = []
connects: list[int] = []
"""One entry for each connection that was made."""


@db.on_engine
def listen(engine: Engine) -> None:
    """Remember the Engine, and set something on each of its connections."""
    listened.append(engine)
    event.listen(engine, "connect", lambda *_: connects.append(1))
    if engine.dialect.name == "postgresql":
        event.listen(engine, "connect", tools.set_on_connection)


@worker_ready.connect
def write_when_ready(**_: Any) -> None:
    """In prefork's main process, which keeps no connection."""
    if config["writes_when_ready"]:
        with db.unit_of_work() as session:
            session.add(Row(key=config["worker"], note="ready"))


@worker_ready.connect
def say_ready(**_: Any) -> None:
    tools.client().rpush(tools.name("ready", config["worker"]), os.getpid())


@task_prerun.connect
@task_postrun.connect
def write_in_a_signal_handler(signal: Any, args: Any, **_: Any) -> None:
    """What a signal handler does that needs the database."""
    if args and str(args[0]).startswith("signalled-"):
        with db.unit_of_work() as session:
            session.add(Row(key=args[0], note=signal.name))


# The result backend is no witness: the second attempt of a retry may store SUCCESS before the first stores RETRY.
@task_success.connect
def say_success(sender: Any, result: Any, **_: Any) -> None:
    tell(sender.request.id, {"state": "SUCCESS", "value": result})


@task_failure.connect
def say_failure(task_id: str, exception: BaseException, einfo: Any, **_: Any) -> None:
    outcome = {"state": "FAILURE", "error": type(exception).__name__, "message": str(exception)}
    tell(task_id, outcome | {"traceback": str(einfo.traceback)})


@task_postrun.connect
def say_ended(task_id: str, state: str | None, **_: Any) -> None:
    """Tell the test that an attempt has ended, Ignore, Reject and BaseException included."""
    tell(task_id, {"ended": state or "NONE"})


def tell(task_id: str, record: dict[str, Any]) -> None:
    if config["silent"]:
        return
    # A limit that strikes here, after the task, would silence the witness; Celery only logs what a handler raises.
    with shield.quiet():
        tools.client().rpush(tools.name("task", task_id), json.dumps(record, default=str))


# With an outbox `before_task_publish` is sent at the call already, when the message is written down.
@(after_task_publish if app.conf.get("alchemy_outbox") else before_task_publish).connect
def say_published(sender: str, body: Any, **_: Any) -> None:
    """Tell the test what the rest of the world can see at the moment at which a message about its key is sent."""
    arguments = body[0]
    if arguments and str(arguments[0]).startswith("watched-"):
        key = arguments[0]
        tools.say(
            key, {"task": sender, "rows": tools.committed(key), "open": tools.open_transactions() + checked_out()}
        )


def checked_out() -> int:
    made = {*db.strategy.engines_made(), *db.coroutines.strategy.engines_made()} if config["awaits"] else {db.engine}
    return sum(one.pool.checkedout() for one in made if hasattr(one.pool, "checkedout"))  # type: ignore[attr-defined]


@app.task
def probe(key: str, parties: int) -> dict[str, Any]:
    """Report on this process, once `parties` probes run at once, so that no pool process is asked twice."""
    tools.barrier(key, parties)
    return {
        "pid": os.getpid(),
        "checkedout": checked_out(),
        "connects": len(connects),
        "strategy": db.strategy.name,
        "reason": db.strategy.reason,
        "max_connections": db.strategy.max_connections,
        "worker_pool": db.strategy.worker_pool.name,
        "listened": listened.count(db.engine) if not config["awaits"] else 1,
        "engine is the user's": not config["awaits"] and db.engine is user_engine,
    }
