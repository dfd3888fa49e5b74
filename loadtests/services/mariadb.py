"""A MariaDB server of the run's own, from the programs of the system."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sqlalchemy import URL

from ..errors import ServiceError
from .processes import StopStep, child_process
from .rundir import RunDirectory

START_S = 60.0
SETTINGS = (
    "--skip-networking", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=32M",
    "--skip-log-bin", "--max-connections=200", "--character-set-server=utf8mb4",
)  # fmt: skip


class MariaDBServer:
    """A server with data of its own at a Unix socket, which can be stopped, crashed and started again.

    Args:
        settings: Arguments of `mariadbd` after ours.
    """

    def __init__(self, run: RunDirectory, *settings: str) -> None:
        self._run, self._settings = run, settings
        self._home = run.path / "mariadb"
        self._home.mkdir(mode=0o700)
        self._socket = self._home / "s"
        self._running = ExitStack()
        self._pid = 0
        self.url: URL = URL.create("mysql+pymysql", username="root", query={"unix_socket": str(self._socket)})

    def start(self) -> None:
        """Start it, and wait until it accepts connections.

        Raises:
            ServiceError: Its programs are not installed, or it does not start; the message ends with its log.
        """
        for program in ("mariadbd", "mariadb-install-db"):
            if shutil.which(program) is None:
                raise ServiceError(f"There is no {program} here: install the package mariadb-server.")
        user = ["--user=root"] if os.geteuid() == 0 else []
        data, environ = f"--datadir={self._home / 'data'}", {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        if not (self._home / "data").exists():
            options = ("--no-defaults", data, "--auth-root-authentication-method=normal", "--skip-test-db", *user)
            command = ["mariadb-install-db", *options]
            with child_process(self._run, "mariadb-install-db", command, environ=environ, steps=()) as install:
                if install.wait(START_S) != 0:
                    raise ServiceError(f"mariadb-install-db failed:\n{install.log_tail()}")
        command = ["mariadbd", "--no-defaults", data, f"--socket={self._socket}", *SETTINGS, *self._settings, *user]
        steps = (StopStep(signal.SIGTERM, 20.0),)
        process = self._running.enter_context(
            child_process(self._run, "mariadb", command, environ=environ, steps=steps)
        )
        self._pid = process.pid
        process.wait_until(self._accepts, "MariaDB", START_S)

    def _accepts(self) -> bool:
        """Whether it greets; PyMySQL would leave the sockets open that are not accepted."""
        with socket.socket(socket.AF_UNIX) as end, contextlib.suppress(OSError):
            end.settimeout(START_S)
            end.connect(str(self._socket))
            return bool(end.recv(1))
        return False

    def crash(self) -> None:
        """Kill it as it stands."""
        os.kill(self._pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """Stop it; a second call does nothing."""
        self._running.close()


@contextmanager
def own_mariadb(run: RunDirectory, *settings: str) -> Iterator[MariaDBServer]:
    """Run a server for the time of the block.

    Raises:
        ServiceError: Its programs are not installed, or it does not start.
    """
    server = MariaDBServer(run, *settings)
    try:
        server.start()
        yield server
    finally:
        server.stop()
