"""The brokers of an outbox storm: where they are, how they are stalled, and what has arrived there."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import redis
from kombu import Connection

from support import servers


@dataclass(frozen=True, slots=True)
class BrokerPlace:
    """A broker, and a process by which it can be stalled."""

    name: str
    url: str
    """Of the broker itself."""
    proxy: dict[str, Any]
    """Where the proxy finds it."""
    through: Callable[[int], str]
    """Returns the URL by way of the proxy at a port."""
    pid: int | None = None
    """Of a server that may be stopped with SIGSTOP; None: the proxy is."""
    options: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def broker_place(name: str) -> Iterator[BrokerPlace]:
    """Give the machine's RabbitMQ, or a Redis of the test's own."""
    if name == "rabbitmq":
        url = servers.rabbitmq()
        with Connection(url) as there:
            host, port, user, password, vhost = (
                there.hostname, there.port or 5672, there.userid, there.password, there.virtual_host,
            )  # fmt: skip
        quoted = "" if vhost == "/" else vhost
        place = {"host": "127.0.0.1" if host == "localhost" else host, "port": port}
        yield BrokerPlace(name, url, place, lambda at: f"amqp://{user}:{password}@127.0.0.1:{at}/{quoted or '/'}")
        return
    from celery_alchemy.loadtests.errors import ServiceError
    from celery_alchemy.loadtests.services.rundir import run_directory
    from celery_alchemy.loadtests.services.servers import ValkeyServer

    with run_directory() as run, contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(ValkeyServer(run))
        except ServiceError:
            import pytest

            pytest.skip("no embedded Valkey here, whose process the test may stop")
        options = {"visibility_timeout": 3, "unacked_mutex_expire": 2}
        place = {"socket": server.socket}
        yield BrokerPlace(name, server.url, place, lambda at: f"redis://127.0.0.1:{at}/0", server.pid, options)


class Pushed:
    """Notes which messages Redis has put into a queue, as the server itself tells it, while the block runs."""

    def __init__(self, socket: str, queue: str) -> None:
        self.ids: set[str] = set()
        self._begin = f"LPUSH {queue} "
        self._client = redis.Redis(unix_socket_path=socket, socket_timeout=None)
        self._monitor = self._client.monitor()
        self._thread = threading.Thread(target=self._listen, name="redis-monitor", daemon=True)

    def __enter__(self) -> "Pushed":
        self._monitor.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.complete()
        self._monitor.__exit__(*exc_info)
        self._client.close()

    def complete(self) -> None:
        """Wait until all is noted that the server was told before this."""
        self._client.echo(END)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server does not tell what it does"

    def _listen(self) -> None:
        for heard in self._monitor.listen():
            command = heard["command"]
            if command == f"ECHO {END}":
                return
            if command.startswith(self._begin):
                self.ids.update(ID.findall(command))


ID = re.compile(r'"id\\?": \\?"([0-9a-f-]{36})')
END = "that is all"
