"""A PgBouncer of the test's own, in front of a PostgreSQL server."""

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import URL

from support.waiting import eventually


def _program() -> str:
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        if "pgbouncer" in os.environ.get("CELERY_ALCHEMY_REQUIRE_SERVERS", "").split(","):
            pytest.fail("CELERY_ALCHEMY_REQUIRE_SERVERS lists pgbouncer, and there is none", pytrace=False)
        pytest.skip("no pgbouncer here: install it to run these tests")
    return found


@contextmanager
def pgbouncer(server: URL, folder: Path, *, pool_size: int = 4) -> Iterator[URL]:
    """Run a PgBouncer in transaction mode for the time of the block; give its URL of the database of `server`."""
    program = _program()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host, user = server.host or server.query.get("host"), server.username
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "users").write_text(f'"{user}" "{server.password or ""}"\n')
    (folder / "pgbouncer.ini").write_text(
        f"""[databases]
* = host='{host}' port={server.port or 5432}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
"""
    )
    command = [program, str(folder / "pgbouncer.ini")]
    if os.geteuid() == 0:  # it refuses to run as root
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777)
        command = [program, "-u", "nobody", str(folder / "pgbouncer.ini")]
        for parent in folder.parents:
            if parent != Path("/") and parent.owner() == getpass.getuser():
                parent.chmod(parent.stat().st_mode | 0o011)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            eventually(lambda: _listens(port, process, folder / "log"), "pgbouncer listens")
            yield server.set(host="127.0.0.1", port=port).difference_update_query(["host"])
        finally:
            process.terminate()
            process.wait(10)


def _listens(port: int, process: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
