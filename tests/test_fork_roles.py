"""Forks of prefork's main process, of a script, and over TLS."""

from collections.abc import Iterator

import pytest
from support import databases, forking, tls

STRATEGIES = ("local", "scoped", "per_process", "engine")
ROLES = [(role, strategy) for role in ("main process", "script") for strategy in STRATEGIES]
#: The ways in which a child speaks to the server without meaning to, and one in which it does.
ACTIONS = [
    "work",
    "session_close",
    "connection_close",
    "raw_close",
    "engine_dispose",
    "drop",
    "leave_block",
    "stop",
]


@pytest.fixture(
    scope="module", params=[(role, s) for role in ("main process", "script") for s in STRATEGIES], ids="-".join
)
def host(
    request: pytest.FixtureRequest, database: databases.PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[forking.Host]:
    role, strategy = request.param
    log = tmp_path_factory.mktemp("forks") / "host.log"
    with forking.host(database, "psycopg", strategy, log, role) as host:
        # There `per_process` has no connection pool, in which a connection could be idle.
        host.keeps_idle = strategy != "per_process"
        yield host


@pytest.mark.parametrize("action", ACTIONS)
def test_child_of_another_process(host: forking.Host, key: str, action: str) -> None:
    """Prefork's main process and a script fork as safely as a pool process."""
    forking.assert_worked(host, key, host.fork(action, key))


@pytest.mark.parametrize(("action", "status"), [("sys_exit", 0), ("kill", -9)])
def test_child_of_another_process_ends(host: forking.Host, key: str, action: str, status: int) -> None:
    assert host.fork(action, key)["status"] == status


@pytest.fixture(scope="module")
def tls_database() -> Iterator[databases.PostgreSQL]:
    with tls.postgresql() as server, databases.new_postgresql(server, "forks") as database:
        yield database


@pytest.fixture(scope="module", params=["psycopg", "psycopg2"])
def tls_host(
    request: pytest.FixtureRequest, tls_database: databases.PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[forking.Host]:
    forking.require(request.param)
    log = tmp_path_factory.mktemp("forks") / "host.log"
    url = tls_database.url("forks", driver=request.param)
    with forking.script("fork_host", log, url=url, strategy="scoped") as script:
        yield forking.Host(script, tls_database)


@pytest.mark.parametrize("action", forking.TOUCHES)
def test_child_touches_tls(tls_host: forking.Host, key: str, action: str) -> None:
    """A word of the child would break the parent's encryption: "decryption failed or bad record mac"."""
    seen = tls_host.database.column("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    assert seen == [True]
    forking.assert_worked(tls_host, key, tls_host.fork(action, key))


@pytest.mark.parametrize(("action", "status"), [("exit", 0), ("sys_exit", 0), ("raise", 1), ("kill", -9)])
def test_child_ends_tls(tls_host: forking.Host, key: str, action: str, status: int) -> None:
    assert tls_host.fork(action, key)["status"] == status
