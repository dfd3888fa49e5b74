"""Fresh interpreters that fork when told to, and a recorder between them and the database server."""

import contextlib
import json
import os
import select
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL

TESTS = Path(__file__).resolve().parent.parent
ANSWER_TIMEOUT_S = 60
GOODBYE = "<goodbye>"
DRIVERS = ("psycopg", "psycopg2", "pymysql", "mysqldb")


class Recorder:
    """A TCP proxy before a database server that writes down what each of its clients says.

    A socket that two processes share is one client: what a child says on its parent's connection is in the parent's
    record, and nowhere else.
    """

    def __init__(self, server: URL) -> None:
        assert server.host is not None
        self._server = (server.host, server.port or (5432 if server.get_backend_name() == "postgresql" else 3306))
        self._parse = _postgresql if server.get_backend_name() == "postgresql" else _mysql
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
        server = socket.create_connection(self._server)
        for one in (client, server):
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


class Script:
    """A program of `tests/scripts` in a fresh interpreter, which answers each line of JSON with one of its own."""

    def __init__(self, name: str, log: Path, **settings: Any) -> None:
        self.log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", f"scripts.{name}", json.dumps(settings)],
                env=environment(),
                cwd=log.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._unread = b""

    def ask(self, **question: Any) -> Any:
        """Return the answer; fail, with the end of the program's log, when there is none in time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not data:
                pytest.fail(f"no answer to {question}, exit code {self._process.poll()}\n{self.log_tail()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if isinstance(answer, dict) and "failed" in answer:
            pytest.fail(f"{question}: {answer['failed']}\n{self.log_tail()}")
        return answer

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def stop(self) -> None:
        """End the program and whatever it has forked."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.stdout.close()


def environment() -> dict[str, str]:
    """Return the environment of a program of `tests/scripts`: it finds `support` and `scripts`, and what we find."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "PYTEST_"))}
    return inherited | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    }


def require(driver: str) -> None:
    """Skip the test when the database driver is not installed."""
    reason = "the driver of mysql+mysqldb is not installed: pip install mysqlclient" if driver == "mysqldb" else None
    pytest.importorskip({"mysqldb": "MySQLdb"}.get(driver, driver), reason=reason)


@contextlib.contextmanager
def script(name: str, log: Path, **settings: Any) -> Iterator[Script]:
    """Run a program of `tests/scripts` for the time of the block."""
    program = Script(name, log, **settings)
    try:
        yield program
    finally:
        program.stop()
