"""What the load generator tells a worker, and the broker through which they meet."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import redis
from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from ..errors import ServiceError
from ..tasks.patterns import OURS
from ..tasks.replies import redis_url
from .rundir import RunDirectory
from .servers import ValkeyServer

DEFAULT_QUEUE = "celery-alchemy-loadtests"
VARIABLE = "LOADTEST_WORKER"
UNACKED = ("unacked", "unacked_index", "unacked_mutex")  # Redis keys of kombu's


@dataclass(frozen=True, slots=True)
class WorkerEnvironment:
    """Where one worker finds its database, its queue and the list it answers to."""

    database_url: str  # SQLAlchemy URL, password included: it travels in the environment, never in an argument list
    broker_url: str  # Kombu URL of the broker
    reply_url: str
    """redis-py URL of the server that holds the reply list; the broker itself where that is Redis or Valkey."""
    queue: str = DEFAULT_QUEUE
    """The one queue this worker consumes; every key it writes in the broker begins with this name."""
    pattern: str = OURS  # Name of the way in which tasks get their Session: one of `patterns.PATTERNS`
    used_in_main: bool = False  # The worker's main process uses the database before it forks, as code at import does

    @property
    def reply_key(self) -> str:
        """The list each finished task is pushed to."""
        return f"{self.queue}.replies"

    @property
    def ready_key(self) -> str:
        """The list the worker announces itself on, once it consumes."""
        return f"{self.queue}.ready"

    def celery_settings(self) -> dict[str, Any]:
        """Return the settings that worker and load generator must share to meet on the queue."""
        # The default exchange routes by queue name, and leaves nothing of its own to delete on RabbitMQ.
        queue: Any = Queue(self.queue, Exchange(""), routing_key=self.queue)
        settings: dict[str, Any] = {
            "broker_url": self.broker_url,
            "broker_connection_retry_on_startup": False,
            "task_ignore_result": True,
            "task_default_queue": self.queue,
            "task_queues": [queue],
            "task_default_exchange": "",
            "task_default_routing_key": self.queue,
            "worker_enable_remote_control": False,
            "worker_prefetch_multiplier": 1,
        }
        if self.broker_url.startswith("redis"):
            # By default all queues of a Redis database share these three keys; ours are deleted after a run.
            settings["broker_transport_options"] = {f"{name}_key": f"{self.queue}.{name}" for name in UNACKED}
        return settings

    def to_environ(self) -> dict[str, str]:
        """Return the variable that `from_environ` reads."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environ(cls) -> WorkerEnvironment:
        """Read what the process that started this worker has told it."""
        return cls(**json.loads(os.environ[VARIABLE]))


CONNECT_S = 5.0


class Broker(NamedTuple):
    """Where tasks go and where their replies come from."""

    url: str  # Kombu URL of the broker
    reply_url: str  # redis-py URL of the server with the reply lists
    label: str  # Product and where it comes from, for people


@contextmanager
def broker(run: RunDirectory, broker_url: str | None = None) -> Iterator[Broker]:
    """Yield the broker behind `broker_url`, or an embedded Valkey that stops when the block ends.

    A broker that is neither Redis nor Valkey gets an embedded Valkey beside it, for the replies.

    Raises:
        ServiceError: It cannot be reached or does not start.
    """
    if broker_url:
        label, reply_url = f"{connect_broker(broker_url)} (BROKER_URL)", redis_url(broker_url)
        if reply_url is not None:
            yield Broker(broker_url, reply_url, label)
            return
        label += " with Valkey (embedded) for the replies"
    with ValkeyServer(run) as own:
        reply_url = f"unix://{own.socket}?db=0"
        yield Broker(broker_url, reply_url, label) if broker_url else Broker(own.url, reply_url, "Valkey (embedded)")


def connect_broker(url: str) -> str:
    """Connect once, and return the name of the transport.

    Raises:
        ServiceError: The URL is not kombu's, or nothing answers there.
    """
    try:
        with _connection(url) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=CONNECT_S)
            return str(connection.transport.driver_type)
    except Exception as error:
        # Each transport raises its own kinds, and an unknown scheme a KeyError.
        raise ServiceError(f"BROKER_URL: cannot connect to {_masked(url)}: {error}") from error


def queue_of(run: RunDirectory, environment: WorkerEnvironment) -> AbstractContextManager[None]:
    """Leave nothing of the environment's queue in the broker when the block ends."""
    arguments = (environment.broker_url, environment.reply_url, environment.queue)
    return run.guard.undoing(delete_queue, *arguments, tolerated=(OSError, redis.RedisError))


def delete_queue(broker_url: str, reply_url: str, queue: str) -> None:
    """Delete a queue, its messages and its replies."""
    with contextlib.closing(redis.Redis.from_url(reply_url)) as client:
        ours = (f"{queue}.{name}" for name in ("replies", "ready", *UNACKED))
        client.delete(queue, f"_kombu.binding.{queue}", *ours)
    if redis_url(broker_url) is None:
        with _connection(broker_url) as connection:
            connection.default_channel.queue_delete(queue)


def _connection(url: str) -> Any:
    return Connection(url, connect_timeout=CONNECT_S)


def _masked(url: str) -> str:
    """Return the URL without its password."""
    with contextlib.suppress(Exception):
        return str(_connection(url).as_uri())
    return url.partition("://")[0] + "://..."
