"""Fresh interpreters that fork when told to, and what must hold whatever their children do."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import make_url

from support import everywhere, preloaded
from support.databases import Database
from support.recorder import Recorder

TESTS = Path(__file__).resolve().parent.parent
ANSWER_TIMEOUT_S = 60
T = TypeVar("T")
DRIVERS = ("psycopg", "psycopg2", "pymysql", "mysqldb")


class Script:
    """A program of `tests/scripts`, which answers each line of JSON with one of its own.

    One that patches itself has an interpreter of its `own`.
    """

    def __init__(self, name: str, log: Path, *, own: bool = False, **settings: Any) -> None:
        self.log = log
        command = [sys.executable, "-m", f"scripts.{name}", json.dumps(settings)]
        self._process = preloaded.start_talking(command, log.parent, log, environment(), own=own)
        self._unread = b""

    def ask(self, *, within_s: float = ANSWER_TIMEOUT_S, **question: Any) -> Any:
        """Return the answer; fail, with the end of the program's log, when there is none in time. The log then says
        where its threads are."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        deadline = time.monotonic() + within_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not data:
                if not ready:
                    self._process.send_signal(signal.SIGABRT)  # its faulthandler writes
                    self._process.wait(10)
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
    return (
        inherited
        | everywhere.ENVIRONMENT
        | {"PYTHONFAULTHANDLER": "1"}
        | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    )


def require(driver: str) -> None:
    """Skip the test when the database driver is not installed."""
    reason = "the driver of mysql+mysqldb is not installed: pip install mysqlclient" if driver == "mysqldb" else None
    pytest.importorskip({"mysqldb": "MySQLdb"}.get(driver, driver), reason=reason)


@contextlib.contextmanager
def script(name: str, log: Path, *, own: bool = False, **settings: Any) -> Iterator[Script]:
    """Run a program of `tests/scripts` for the time of the block."""
    program = Script(name, log, own=own, **settings)
    try:
        yield program
    finally:
        program.stop()


TOUCHES = [
    "session_close",
    "session_rollback",
    "session_commit",
    "session_invalidate",
    "connection_close",
    "connection_rollback",
    "connection_commit",
    "connection_invalidate",
    "connection_detach",
    "raw_close",
    "raw_rollback",
    "engine_dispose",
    "db_dispose",
    "drop",
    "scoped_remove",
    "strategy_remove",
    "leave_block",
    "fail_block",
    "stop",
]


class Host:
    """A process that forks, the database behind it, and the record of all it and its children say to the server."""

    def __init__(self, script: Script, database: Database, recorder: Recorder | None = None) -> None:
        self.script, self.database, self.recorder = script, database, recorder
        self.keeps_idle = True

    def fork(self, action: str, key: str) -> dict[str, Any]:
        """Let the parent open its transactions, a child do `action`, the parent commit; the parent must not notice."""
        held = self.script.ask(hold=key)
        ports = [*held["ports"], held["idle_port"]]
        before = self._said(ports)
        child = self.script.ask(fork=action)
        finished = self.script.ask(finish=True)
        said = {port: now[len(before[port]) :] for port, now in self._said(ports).items()}
        assert {"session", "connection"} <= set(self.database.rows(key)), f"the parent's rows are lost: {child}"
        if self.keeps_idle:
            assert finished["idle_after"] == finished["idle_before"], "the idle connection of the parent is another one"
        if self.recorder is None:
            return child
        # What the parent itself says after that, such as its connection pool's ROLLBACK, is its own affair.
        for port in held["ports"]:
            assert said[port][0].upper() == "COMMIT", "somebody else has spoken on the parent's connection"
        if self.keeps_idle:
            assert said[held["idle_port"]][0].upper().startswith(("BEGIN", "SELECT"))
        return child

    def _said(self, ports: list[int]) -> dict[int, list[str]]:
        return {port: self.recorder.statements(port) if self.recorder else [] for port in ports}


def assert_worked(host: Host, key: str, child: dict[str, Any]) -> None:
    """The child did new work of its own, on a connection of its own."""
    assert (child["status"], child["hung"]) == (0, False), child
    assert "answer" in child, child.get("error", child)
    assert child["answer"]["pid"] not in child["answer"]["parents"]
    assert sorted(host.database.rows(key)) == ["child", "connection", "session"]


@contextlib.contextmanager
def host(database: Database, driver: str, strategy: str, log: Path, role: str = "pool process") -> Iterator[Host]:
    """Run `scripts.fork_host` behind a recorder for the time of the block."""
    url = make_url(database.url("forks"))
    with Recorder(url) as recorder:
        url = url.difference_update_query(["host"]).set(host="127.0.0.1", port=recorder.port)
        url = url.set(drivername=f"{url.get_backend_name()}+{driver}")
        text = url.render_as_string(hide_password=False)
        with script("fork_host", log, url=text, strategy=strategy, role=role) as program:
            yield Host(program, database, recorder)


@contextlib.contextmanager
def side_by_side(contexts: Mapping[str, AbstractContextManager[T]]) -> Iterator[dict[str, T]]:
    """Enter all contexts at once, each in a thread, and leave them likewise."""
    with ThreadPoolExecutor(len(contexts)) as executor:
        entered = {name: executor.submit(context.__enter__) for name, context in contexts.items()}
        try:
            yield {name: one.result() for name, one in entered.items()}
        finally:
            left = [
                executor.submit(contexts[name].__exit__, None, None, None)
                for name, one in entered.items()
                if one.exception() is None
            ]
            for one in left:
                one.result()
