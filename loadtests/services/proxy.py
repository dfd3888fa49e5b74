"""A TCP proxy before a database: it counts round trips, or plays a network that fails."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import selectors
import signal
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self, TypeVar

from sqlalchemy import URL, make_url

DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Conversation:
    """One connection of a client; both its ends share this object."""

    client: asyncio.Transport
    server: asyncio.Transport
    client_port: int
    asked: bool = False  # The client was the last one to speak
    silent: bool = False  # Nothing is passed on any more, in neither direction, and neither side is told


class _End(asyncio.Protocol):
    """One end of a conversation; it is heard once both ends are there."""

    talk: Conversation | None = None

    def __init__(self, proxy: Proxy, *, from_client: bool) -> None:
        self._proxy, self._from_client = proxy, from_client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        if self.talk and not self.talk.silent:
            self._proxy.heard(self.talk, data, from_client=self._from_client)
            self._proxy.pass_on(self.talk, data, from_client=self._from_client)

    def eof_received(self) -> bool:
        return self.talk is not None and self.talk.silent  # then it stays open: the other side is not told

    def connection_lost(self, error: Exception | None) -> None:
        if self.talk:
            self._proxy.hang_up(self.talk)


class Proxy:
    """Forwards connections to a database, from a thread of its own, until it is closed or its block ends.

    Args:
        database: Where it is; a Unix socket is reached too.
        host: The loopback address to listen on.
    """

    selector: type[selectors.BaseSelector] = selectors.DefaultSelector

    def __init__(self, database: URL, host: str = "127.0.0.1") -> None:
        self._database = database
        self._listener = socket.create_server((host, 0))
        self._address: tuple[str, int] = self._listener.getsockname()[:2]
        self._talks: set[Conversation] = set()
        self._silent = False
        self._closed = asyncio.Event()
        self._accepting: asyncio.Task[None] | None = None
        self._loop = asyncio.SelectorEventLoop(self.selector())
        self._thread = threading.Thread(target=self._run, name="database-proxy", daemon=True)
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
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- a network that fails ----------------------------------------------------------------------------------------

    def cut(self) -> int:
        """Reset every connection that is open now, on both sides; return how many there were."""
        return self._do(self._cut())

    def fall_silent(self) -> None:
        """Pass nothing on any more, and tell neither side: what is open is half open, new ones get no answer."""

        async def work() -> None:
            self._silent = True
            for talk in self._talks:
                talk.silent = True

        self._do(work())

    def recover(self) -> None:
        """Pass new connections on again, and accept them; what fell silent stays so, as behind a lost route."""
        self._do(self._listen())

    def refuse(self) -> None:
        """Refuse new connections, as a host does whose server is not running; those that are open go on."""
        self._do(self._refuse())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Have `work` done in the proxy's thread, which alone touches the sockets; return what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- forwarding, in the proxy's thread ---------------------------------------------------------------------------

    def heard(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """`data` is about to be passed on; for subclasses."""

    def pass_on(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """Send `data` on; for subclasses."""
        (talk.server if from_client else talk.client).write(data)

    def hang_up(self, talk: Conversation) -> None:
        """End a conversation, one of whose sides has ended it; for subclasses."""
        self._talks.discard(talk)
        talk.client.close()
        talk.server.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._forward())

    async def _forward(self) -> None:
        await self._listen()
        await self._closed.wait()
        await self._refuse()
        await self._cut(reset=False)

    async def _listen(self) -> None:
        self._silent = False
        if self._listener.fileno() == -1:
            self._listener = socket.create_server(self._address)
        if self._accepting is None:
            self._listener.setblocking(False)
            self._accepting = self._loop.create_task(self._accept())

    async def _accept(self) -> None:
        while True:
            client, address = await self._loop.sock_accept(self._listener)
            try:
                server = _connect(self._database)
            except OSError:
                client.close()
                continue
            to_client, asking = await self._loop.connect_accepted_socket(lambda: _End(self, from_client=True), client)
            to_server, answering = await self._loop.create_connection(
                lambda: _End(self, from_client=False), sock=server
            )
            asking.talk = answering.talk = talk = Conversation(to_client, to_server, address[1], silent=self._silent)
            self._talks.add(talk)
            to_client.resume_reading()
            to_server.resume_reading()

    async def _refuse(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
            self._accepting = None
            self._listener.close()

    async def _cut(self, *, reset: bool = True) -> int:
        talks = list(self._talks)
        for talk in talks:
            self._talks.discard(talk)
            for end in (talk.client, talk.server):
                if reset and end.get_extra_info("socket").family != socket.AF_UNIX:
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                end.abort()
        await asyncio.sleep(0)  # they are closed in the next turn
        return len(talks)


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
    selector = selectors.SelectSelector

    def __init__(self, database: URL, delay_s: float) -> None:
        self.delay_s = delay_s
        super().__init__(database)

    def pass_on(self, talk: Conversation, data: bytes, *, from_client: bool) -> None:
        """Hold what the server says back for the delay."""
        if from_client:
            super().pass_on(talk, data, from_client=True)
        else:
            self._loop.call_later(self.delay_s, self.arrive, talk, data)

    def arrive(self, talk: Conversation, data: bytes) -> None:
        """Let what the server has said arrive."""
        if not talk.silent and not talk.client.is_closing():
            talk.client.write(data)

    def hang_up(self, talk: Conversation) -> None:
        """End a conversation after what is on the way."""
        self._loop.call_later(self.delay_s, super().hang_up, talk)


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
