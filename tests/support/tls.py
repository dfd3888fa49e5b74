"""A PostgreSQL server that speaks TLS, started from the programs of the one installed on this machine."""

import contextlib
import glob
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, NullPool, create_engine
from sqlalchemy.exc import OperationalError

from support.waiting import eventually


@contextlib.contextmanager
def postgresql() -> Iterator[URL]:
    """Start a server with `ssl = on` and a certificate of its own; skip when its programs or openssl are not here."""
    programs, openssl = _programs(), shutil.which("openssl")
    if programs is None or openssl is None:
        pytest.skip(f"no {'openssl' if programs else 'PostgreSQL server programs'} here to start a server with TLS")
    # Not below pytest's folder, which the server's user, if it is another one, cannot enter.
    home = Path(tempfile.mkdtemp(prefix="celery-alchemy-tls-"))
    # PostgreSQL refuses to run as root.
    account: dict[str, Any] = {"user": "nobody", "group": -1, "extra_groups": []} if os.geteuid() == 0 else {}
    if account:
        import pwd

        account["group"] = pwd.getpwnam("nobody").pw_gid
        shutil.chown(home, "nobody")

    environment = {"PATH": os.defpath, "LC_ALL": "C"}

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            command, check=False, cwd=home, env=environment, capture_output=True, timeout=60, **account
        )
        if done.returncode:
            pytest.skip(f"cannot start a PostgreSQL with TLS: {done.stderr.decode(errors='replace')[-500:]}")

    server = None
    try:
        run(programs / "initdb", "-D", home / "data", "-U", "tls", "--auth=trust", "--encoding=UTF8", "--no-sync")
        certificate = ["-subj", "/CN=localhost", "-days", "2", "-keyout", "server.key", "-out", "server.crt"]
        run(openssl, "req", "-new", "-x509", "-nodes", "-newkey", "rsa:2048", *certificate)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = {"ssl": "on", "ssl_cert_file": home / "server.crt", "ssl_key_file": home / "server.key"}
        settings |= {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "port": port}
        options = [f"--{name}={value}" for name, value in settings.items()]
        with (home / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", home / "data", *options],
                cwd=home,
                env=environment,
                stdout=log,
                stderr=log,
                **account,
            )
        query = {"sslmode": "require"}
        url = URL.create("postgresql+psycopg", "tls", host="127.0.0.1", port=port, database="postgres", query=query)
        eventually(lambda: _answers(url) or server.poll() is not None, "the server answers", within_s=30)
        if server.poll() is not None:
            pytest.skip(f"cannot start a PostgreSQL with TLS: {(home / 'log').read_text()[-500:]}")
        yield url
    finally:
        if server is not None:
            server.terminate()
            server.wait(20)
        shutil.rmtree(home)


def _programs() -> Path | None:
    found = [Path(path).parent for path in sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"), reverse=True)]
    on_path = shutil.which("postgres")
    if on_path:
        found.append(Path(on_path).resolve().parent)
    return next((folder for folder in found if (folder / "initdb").exists()), None)


def _answers(url: URL) -> bool:
    try:
        with create_engine(url, poolclass=NullPool).connect():
            return True
    except OperationalError:
        return False
