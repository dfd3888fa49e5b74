"""What the small projects of tests/adopting import: where they run, how their tasks end, and who looks on.

In a worker it is imported by the project; in the tests it starts the workers.
"""

import json
import os
import time
from typing import Any

import redis
from celery import Celery, signals

CONFIG: dict[str, Any] = json.loads(os.environ.get("HAND_WRITTEN", "{}"))
URL: str = CONFIG.get("database_url", "")
CHECKS: str = CONFIG.get("checks", "checks")
_client: "redis.Redis | None" = None


class Again(Exception):
    """The task is to run again, from its beginning."""


def configure(app: Celery) -> None:
    """Let `app` talk to the servers of this test."""
    app.conf.update(
        broker_url=CONFIG["broker_url"],
        broker_transport_options={"global_keyprefix": CONFIG["prefix"]},
        broker_connection_retry_on_startup=True,
        task_ignore_result=True,
        task_default_queue=CONFIG["queue"],
        worker_prefetch_multiplier=1,
    )
    signals.task_success.connect(_succeeded, weak=False)
    signals.task_failure.connect(_failed, weak=False)
    signals.worker_ready.connect(_ready, weak=False)


def fate(key: str, n: int) -> None:
    """End a task in the way that its number asks for: three of five go on, one fails, one runs again once."""
    time.sleep(0.02)
    if n % 5 == 3:
        raise ValueError(n)
    if n % 5 == 4 and client().incr(f"{CONFIG['prefix']}attempts:{key}:{n}") == 1:
        raise Again(n)


def slow() -> None:
    """Take time, so that what is sent before this is looked at before what comes after."""
    time.sleep(0.04)


def client() -> "redis.Redis":
    """This process's connections to Redis."""
    global _client  # noqa: PLW0603
    if _client is None:
        _client = redis.Redis.from_url(CONFIG["redis_url"], decode_responses=True)
    return _client


os.register_at_fork(after_in_child=lambda: globals().update(_client=None))


def tell(what: str) -> None:
    """Tell the test something."""
    client().rpush(f"{CONFIG['prefix']}told:{CONFIG['queue']}", what)


def _succeeded(sender: Any, **_: Any) -> None:
    tell(f"{sender.request.id} SUCCESS")


def _failed(task_id: str, exception: BaseException, **_: Any) -> None:
    tell(f"{task_id} {type(exception).__name__}")


def _ready(**_: Any) -> None:
    tell("ready")
