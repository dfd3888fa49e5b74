"""A broker for the queue and a Redis or Valkey for the replies; they are one where they can be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import redis
from kombu.connection import Connection

from ..errors import ServiceError
from ..tasks.replies import redis_url
from .environment import WorkerEnvironment
from .rundir import RunDirectory
from .servers import ValkeyServer

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
        client.delete(*WorkerEnvironment("", broker_url, reply_url, queue).broker_keys)
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
