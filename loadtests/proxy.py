"""A proxy between a worker and its database that counts round trips."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import URL

BYTES = 65536
DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}


@dataclass(slots=True)
class _Conversation:
    """One connection of a client; both its ends share this object."""

    client: socket.socket
    server: socket.socket
    asked: bool = False
    """The client was the last one to speak."""


class CountingProxy:
    """Forwards connections to a database, and counts how often the server answers the client.

    One thread and blocking sends: made for one worker that runs one task at a time.
    """

    def __init__(self, database: URL) -> None:
        self._database = database
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._forward, name="counting-proxy", daemon=True)
        self._thread.start()
        self.round_trips = 0
        """Answers of the server so far, the ones to connecting included."""

    @property
    def url(self) -> URL:
        """The URL of the same database by way of the proxy, over TCP."""
        query = {name: value for name, value in self._database.query.items() if name not in {"host", "unix_socket"}}
        return self._database.set(host="127.0.0.1", port=self._listener.getsockname()[1], query=query)

    def close(self) -> None:
        """Close all connections."""
        self._wake.close()
        self._thread.join()

    def _forward(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._selector.close)
            stack.callback(self._woken.close)
            stack.callback(self._listener.close)
            stack.callback(self._hang_up_all)
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket) and key.fd != -1:
                        self._pass_on(key.fileobj, key.data)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = _connect(self._database)
        except OSError:
            client.close()
            return
        talk = _Conversation(client, server)
        for end in (client, server):
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(end, selectors.EVENT_READ, talk)

    def _pass_on(self, source: socket.socket, talk: _Conversation) -> None:
        if source.fileno() == -1:
            return  # the other end hung up in the same turn
        try:
            data = source.recv(BYTES)
            if data:
                if source is talk.client:
                    talk.asked = True
                    talk.server.sendall(data)
                else:
                    self.round_trips += talk.asked
                    talk.asked = False
                    talk.client.sendall(data)
                return
        except OSError:
            pass
        self._hang_up(talk)

    def _hang_up(self, talk: _Conversation) -> None:
        for end in (talk.client, talk.server):
            self._selector.unregister(end)
            end.close()

    def _hang_up_all(self) -> None:
        talks = {id(key.data): key.data for key in self._selector.get_map().values() if key.data is not None}
        for talk in talks.values():
            self._hang_up(talk)


def _connect(database: URL) -> socket.socket:
    backend, port = database.get_backend_name(), database.port
    port = port or DEFAULT_PORTS[backend]
    path = database.query.get("unix_socket")
    host = database.query.get("host") or database.host or "127.0.0.1"
    if isinstance(host, str) and host.startswith("/"):
        path = f"{host}/.s.PGSQL.{port}"
    if not isinstance(path, str):
        return socket.create_connection((str(host), port))
    end = socket.socket(socket.AF_UNIX)
    end.connect(path)
    return end


@contextmanager
def counting_proxy(database: URL) -> Iterator[CountingProxy]:
    """Yield a proxy to `database`; it is gone when the block ends."""
    proxy = CountingProxy(database)
    try:
        yield proxy
    finally:
        proxy.close()
