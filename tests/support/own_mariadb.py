"""A MariaDB server of a test's own, which may be stopped, crashed and started again."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

from celery_alchemy.loadtests.services.rundir import RunDirectory
from celery_alchemy.loadtests.services.servers import MariaDBServer

__all__ = ["MariaDBServer", "own_mariadb"]

#: What is committed survives the process, not the machine.
QUICK = "--innodb-flush-log-at-trx-commit=2"


@contextlib.contextmanager
def own_mariadb(run: RunDirectory, *settings: str) -> Iterator[MariaDBServer]:
    """Run a server with these settings for the time of the block; skip the test where its programs are not
    installed."""
    if shutil.which("mariadbd") is None or shutil.which("mariadb-install-db") is None:
        pytest.skip("no mariadbd here to start a server of the test's own (package mariadb-server)")
    with MariaDBServer(run, QUICK, *settings) as server:
        yield server
