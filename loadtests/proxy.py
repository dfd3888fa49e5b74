"""A TCP proxy before a database: it counts round trips, or plays a network that fails."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import URL

BYTES = 65536
DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time


@dataclass(slots=True, eq=False)
class Conversation:
    """One connection of a client; both its ends share this object."""

    client: socket.socket
    server: socket.socket
    client_port: int
    asked: bool = False
    """The client was the last one to speak."""
    silent: bool = False
    """Nothing is passed on any more, in neither direction, and nobody is told."""


class Proxy:
    """Forwards connections to a database.

    One thread and blocking sends: made for tests and for small messages.

    Args:
        database: Where it is; a Unix socket is reached too.
        host: The loopback address to listen on.
    """

    def __init__(self, database: URL, host: str = "127.0.0.1") -> None:
        self._database = database
        self._listener = socket.create_server((host, 0))
        self._address: tuple[str, int] = self._listener.getsockname()[:2]
        self._orders: list[tuple[Callable[[], None], threading.Event]] = []
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._silent = False
        self._thread = threading.Thread(target=self._forward, name="database-proxy", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._address[1]

    @property
    def url(self) -> URL:
        """The URL of the same database by way of the proxy, over TCP."""
        query = {name: value for name, value in self._database.query.items() if name not in {"host", "unix_socket"}}
        return self._database.set(host=self._address[0], port=self.port, query=query)

    def close(self) -> None:
        """Close all connections."""
        self._wake.close()
        self._thread.join()

    def heard(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """`data` is about to be passed on; for subclasses, in the proxy's thread."""

    # -- a network that fails ----------------------------------------------------------------------------------------

    def cut(self) -> int:
        """Reset every connection that is open now, on both sides; return how many there were."""
        cut: list[Conversation] = []

        def work() -> None:
            for talk in self._talks():
                for end in (talk.client, talk.server):
                    if end.family != socket.AF_UNIX:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                self._hang_up(talk)
                cut.append(talk)

        self._do(work)
        return len(cut)

    def fall_silent(self) -> None:
        """Pass nothing on any more, and tell nobody: what is open is half open, new connections get no answer."""

        def work() -> None:
            self._silent = True
            for talk in self._talks():
                talk.silent = True

        self._do(work)

    def recover(self) -> None:
        """Pass new connections on again, and accept them; what fell silent stays so, as behind a lost route."""

        def work() -> None:
            self._silent = False
            if self._listener.fileno() == -1:
                self._listener = socket.create_server(self._address)
                self._selector.register(self._listener, selectors.EVENT_READ)

        self._do(work)

    def refuse(self) -> None:
        """Refuse new connections, as a host does whose server is not running; those that are open go on."""

        def work() -> None:
            if self._listener.fileno() != -1:
                self._selector.unregister(self._listener)
                self._listener.close()

        self._do(work)

    # -- forwarding --------------------------------------------------------------------------------------------------

    def _do(self, work: Callable[[], None]) -> None:
        """Have `work` done by the forwarding thread, which alone touches the sockets."""
        done = threading.Event()
        self._orders.append((work, done))
        self._wake.send(b".")
        done.wait()

    def _forward(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._selector.close)
            stack.callback(self._woken.close)
            stack.callback(self._end)
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._woken:
                        if not self._woken.recv(BYTES):
                            return
                        self._obey()
                    elif key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket) and key.fd != -1:
                        self._pass_on(key.fileobj, key.data)

    def _end(self) -> None:
        self._listener.close()  # another one than at first, after `refuse` and `recover`
        for talk in self._talks():
            self._hang_up(talk)

    def _obey(self) -> None:
        while self._orders:
            work, done = self._orders.pop(0)
            work()
            done.set()

    def _accept(self) -> None:
        if self._listener.fileno() == -1:
            return  # refused in the same turn
        client, address = self._listener.accept()
        try:
            server = _connect(self._database)
        except OSError:
            client.close()
            return
        talk = Conversation(client, server, address[1], silent=self._silent)
        for end in (client, server):
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(end, selectors.EVENT_READ, talk)

    def _pass_on(self, source: socket.socket, talk: Conversation) -> None:
        if source.fileno() == -1:
            return  # the other end hung up in the same turn
        try:
            data = source.recv(BYTES)
            if talk.silent:
                if not data:
                    self._selector.unregister(source)  # it is gone; the other side is not told
                return
            if data:
                from_client = source is talk.client
                self.heard(talk, data, from_client=from_client)
                (talk.server if from_client else talk.client).sendall(data)
                return
        except OSError:
            pass
        self._hang_up(talk)

    def _talks(self) -> list[Conversation]:
        return list({id(key.data): key.data for key in self._selector.get_map().values() if key.data}.values())

    def _hang_up(self, talk: Conversation) -> None:
        for end in (talk.client, talk.server):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(end)
            end.close()


class CountingProxy(Proxy):
    """A proxy that counts how often the server answers the client: for a worker that runs one task at a time."""

    round_trips = 0
    """Answers of the server so far, the ones to connecting included."""

    def heard(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """Count an answer when it begins."""
        if not from_client:
            self.round_trips += talk.asked
        talk.asked = from_client


class DistantProxy(CountingProxy):
    """A proxy to a database that is far away: each round trip takes longer. For one client at a time.

    Args:
        delay_s: How much longer, in seconds.
    """

    def __init__(self, database: URL, delay_s: float) -> None:
        self.delay_s = delay_s
        super().__init__(database)

    def heard(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """Hold an answer back when it begins."""
        if not from_client and talk.asked:
            time.sleep(self.delay_s)
        super().heard(talk, data, from_client=from_client)


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
    with contextlib.closing(CountingProxy(database)) as proxy:
        yield proxy
