"""A proxy between a database server and its clients that writes down what each of them says."""

import contextlib
import os
import selectors
import socket
import threading
from typing import Any

from sqlalchemy import URL

GOODBYE = "<goodbye>"


class Recorder:
    """A TCP proxy before a database server that writes down what each of its clients says.

    A socket that two processes share is one client: what a child says on its parent's connection is in the parent's
    record, and nowhere else.
    """

    def __init__(self, server: URL) -> None:
        postgresql = server.get_backend_name() == "postgresql"
        self._parse = _postgresql if postgresql else _mysql
        port = server.port or (5432 if postgresql else 3306)
        folder = str(server.query.get("host", ""))  # of the Unix socket, as libpq spells it
        self._family = socket.AF_UNIX if folder else socket.AF_INET
        self._server: Any = f"{folder}/.s.PGSQL.{port}" if folder else (server.host or "127.0.0.1", port)
        self._said: dict[int, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.port = self._listener.getsockname()[1]
        self._stop_reader, self._stop_writer = os.pipe()
        self._selector.register(self._stop_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="recorder")

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stop_writer, b".")
        self._thread.join()
        os.close(self._stop_reader)
        os.close(self._stop_writer)

    def statements(self, client_port: int) -> list[str]:
        """Return the statements of the client with this local port; `GOODBYE` where it ended the conversation."""
        return self._parse(bytes(self._said[client_port]))

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._stop_reader:
                    self._close()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._pass_on(key)

    def _accept(self) -> None:
        client, address = self._listener.accept()
        server = socket.socket(self._family)
        server.connect(self._server)
        for one in (client, server):
            if one.family == socket.AF_INET:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        record = self._said[address[1]] = bytearray()
        self._selector.register(client, selectors.EVENT_READ, (server, record))
        self._selector.register(server, selectors.EVENT_READ, (client, None))

    def _pass_on(self, key: selectors.SelectorKey) -> None:
        here: Any = key.fileobj
        there, record = key.data
        try:
            data = here.recv(65536)
            if data and record is not None:
                record += data
            if data:
                there.sendall(data)
                return
        except OSError:
            pass
        for one in (here, there):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(one)
            one.close()

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()


def _postgresql(stream: bytes) -> list[str]:
    found, position, greeted = [], 0, False
    while position + 5 <= len(stream):
        if not greeted:
            length = int.from_bytes(stream[position : position + 4])
            # Anything else before the start-up message asks for encryption.
            greeted = int.from_bytes(stream[position + 4 : position + 6]) == 3
            position += length
            continue
        kind, body = stream[position : position + 1], position + 5
        position += 1 + int.from_bytes(stream[position + 1 : position + 5])
        if kind == b"Q":
            found.append(stream[body : position - 1].decode())
        elif kind == b"P":
            found.append(stream[body:position].split(b"\0")[1].decode())
        elif kind == b"X":
            found.append(GOODBYE)
    return found


def _mysql(stream: bytes) -> list[str]:
    found, position = [], 0
    while position + 5 <= len(stream):
        length, number = int.from_bytes(stream[position : position + 3], "little"), stream[position + 3]
        command, text = stream[position + 4], stream[position + 5 : position + 4 + length]
        position += 4 + length
        if number:  # the greeting; every command starts at 0
            continue
        found.append({1: GOODBYE, 3: text.decode(errors="replace")}.get(command, f"<command {command}>"))
    return found
