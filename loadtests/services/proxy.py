"""A TCP proxy before a database: it counts round trips, or plays a network that fails."""

from __future__ import annotations

import contextlib
import multiprocessing
import selectors
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

from sqlalchemy import URL, make_url

BYTES = 65536
DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time


@dataclass(slots=True, eq=False)
class Conversation:
    """One connection of a client; both its ends share this object."""

    client: socket.socket
    server: socket.socket
    client_port: int
    asked: bool = False  # The client was the last one to speak
    silent: bool = False  # Nothing is passed on any more, in neither direction, and neither side is told


class Proxy:
    """Forwards connections to a database, until it is closed or its block ends.

    One thread and blocking sends: made for tests and for small messages. asyncio's transports took 50 us longer for a
    round trip, which is a fifth of the shortest delay that is measured.

    Args:
        database: Where it is; a Unix socket is reached too.
        host: The loopback address to listen on.
    """

    selector: type[selectors.BaseSelector] = selectors.DefaultSelector

    def __init__(self, database: URL, host: str = "127.0.0.1") -> None:
        self._database = database
        self._listener = socket.create_server((host, 0))
        self._address: tuple[str, int] = self._listener.getsockname()[:2]
        self._orders: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._wake, self._woken = socket.socketpair()
        self._selector = self.selector()
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
        return _through(self._database, *self._address)

    def close(self) -> None:
        """Close all connections."""
        self._wake.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def heard(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """`data` is about to be passed on; for subclasses, in the proxy's thread."""

    def pass_on(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """Send `data` on; for subclasses, in the proxy's thread."""
        (talk.server if from_client else talk.client).sendall(data)

    def _before_waiting(self) -> float | None:
        """Return how long to wait for the sockets, in seconds; None: until there is something."""
        return None

    def cut(self) -> int:
        """Reset every connection that is open now, on both sides; return how many there were."""

        def work() -> int:
            talks = self._talks()
            for talk in talks:
                for end in (talk.client, talk.server):
                    if end.family != socket.AF_UNIX:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                self._hang_up(talk)
            return len(talks)

        return int(self._do(work))

    def fall_silent(self) -> None:
        """Pass nothing on any more, and tell neither side: what is open is half open, new ones get no answer."""

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

    @property
    def open(self) -> int:
        """How many connections go through it now."""
        count: int = self._do(lambda: len(self._talks()))
        return count

    def _do(self, work: Callable[[], Any]) -> Any:
        """Have `work` done by the forwarding thread, which alone touches the sockets; return what it returns."""
        done: Future[Any] = Future()
        self._orders.append((work, done))
        self._wake.send(b".")
        return done.result()

    def _forward(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._selector.close)
            stack.callback(self._woken.close)
            stack.callback(self._end)
            while True:
                for key, _ in self._selector.select(self._before_waiting()):
                    if key.fileobj is self._woken:
                        if not self._woken.recv(BYTES):
                            return
                        self._obey()
                    elif key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket) and key.fd != -1:
                        self._receive(key.fileobj, key.data)

    def _end(self) -> None:
        self._listener.close()  # another one than at first, after `refuse` and `recover`
        for talk in self._talks():
            self._hang_up(talk)

    def _obey(self) -> None:
        while self._orders:
            work, done = self._orders.pop(0)
            done.set_result(work())

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

    def _receive(self, source: socket.socket, talk: Conversation) -> None:
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
                self.pass_on(talk, data, from_client=from_client)
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

    round_trips: int = 0  # Answers of the server so far, the ones to connecting included

    def heard(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """Count an answer when it begins."""
        if not from_client:
            self.round_trips += talk.asked
        talk.asked = from_client


class DistantProxy(CountingProxy):
    """A proxy to a database that is far away: every answer takes longer, those of several clients side by side.

    Args:
        delay_s: How much longer, in seconds.
    """

    # epoll and poll wait for whole milliseconds. It takes descriptors below 1,024: as many as our servers accept.
    selector: type[selectors.BaseSelector] = selectors.SelectSelector

    def __init__(self, database: URL, delay_s: float) -> None:
        self.delay_s = delay_s
        self._on_the_way: deque[tuple[float, Conversation, bytes]] = deque()
        super().__init__(database)

    def pass_on(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """Hold what the server says back for the delay."""
        if from_client:
            super().pass_on(talk, data, from_client=True)
        else:
            self._on_the_way.append((time.monotonic() + self.delay_s, talk, data))

    def _before_waiting(self) -> float | None:
        while self._on_the_way and self._on_the_way[0][0] <= time.monotonic():
            self._arrive(*self._on_the_way.popleft()[1:])
        return max(0.0, self._on_the_way[0][0] - time.monotonic()) if self._on_the_way else None

    def _arrive(self, talk: Conversation, data: bytes) -> None:
        if talk.silent or talk.client.fileno() == -1:
            return
        try:
            talk.client.sendall(data)
        except OSError:
            self._hang_up(talk)

    def _hang_up(self, talk: Conversation) -> None:
        last = [data for _, other, data in self._on_the_way if other is talk]
        self._on_the_way = deque(entry for entry in self._on_the_way if entry[1] is not talk)
        for data in last:
            self._arrive(talk, data)
        super()._hang_up(talk)


def _serve(address: str, delay_s: float, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers first
    with DistantProxy(make_url(address), delay_s) as proxy:
        pipe.send(proxy.port)
        with contextlib.suppress(EOFError):
            pipe.recv()  # until the process that measures needs it no more, or is gone


@contextmanager
def distant(database: URL, delay_s: float) -> Iterator[URL]:
    """Give the URL of `database` by way of a distant proxy in a process of its own, which shares no interpreter lock.

    Args:
        delay_s: How much longer each round trip takes, in seconds.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    address = database.render_as_string(hide_password=False)
    process = context.Process(target=_serve, args=(address, delay_s, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _through(database, "127.0.0.1", ours.recv())
    finally:
        ours.close()
        process.join(10)


def _through(database: URL, host: str, port: int) -> URL:
    query = {name: value for name, value in database.query.items() if name not in {"host", "unix_socket"}}
    return database.set(host=host, port=port, query=query)


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
