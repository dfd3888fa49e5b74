"""Whatever the child of a fork does with what it inherits, the transactions of its parent survive it."""

from collections.abc import Iterator

import pytest
from support import databases, forking, servers

STRATEGIES = ("local", "scoped", "per_process", "engine")
HOSTS = [(driver, strategy) for driver in forking.DRIVERS for strategy in STRATEGIES]


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_forks") as database:
        yield database


@pytest.fixture(scope="module", params=HOSTS, ids="-".join)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[forking.Host]:
    driver, strategy = request.param
    forking.require(driver)
    database = request.getfixturevalue("database" if driver.startswith("psycopg") else "mariadb")
    folder = tmp_path_factory.mktemp("forks")
    with forking.host(database, driver, strategy, folder / "host.log") as host:
        yield host


@pytest.mark.parametrize(("action", "status"), [("exit", 0), ("sys_exit", 0), ("raise", 1), ("kill", -9)])
def test_child_ends(host: forking.Host, key: str, action: str, status: int) -> None:
    """However a child ends, nothing is said on the parent's connections."""
    assert host.fork(action, key)["status"] == status


def test_child_works(host: forking.Host, key: str) -> None:
    """A child opens units of work on connections of its own, without being told about the fork."""
    forking.assert_worked(host, key, host.fork("work", key))


@pytest.mark.parametrize("action", forking.TOUCHES)
def test_child_touches(host: forking.Host, key: str, action: str) -> None:
    """What a child closes, commits, rolls back, throws away or collects is not the parent's."""
    forking.assert_worked(host, key, host.fork(action, key))


@pytest.mark.parametrize("what", ["inherited_session", "inherited_connection", "raw_query"])
def test_child_asks_for_the_parents_data(host: forking.Host, key: str, what: str) -> None:
    """What is inherited raises; after a rollback it works on a connection of its own, or goes on refusing."""
    child = host.fork(what, key)
    forking.assert_worked(host, key, child)
    result = child["answer"]["result"]
    assert result["first"] is not None
    for answer in result["answers"]:
        assert answer == [], "the child has read what its parent has not committed"


def test_unit_of_work_of_the_parent_is_not_open_in_the_child(host: forking.Host, key: str) -> None:
    result = host.fork("inherited_session", key)["answer"]["result"]
    assert result["no_unit_of_work"] == "NoUnitOfWork"
    assert (result["rollback"], result["second"]) == (None, None), "the inherited Session does not recover"


def test_commit_of_the_parents_session_in_the_child_is_no_success(host: forking.Host, key: str) -> None:
    """The child must not believe that it has committed what only its parent can commit."""
    child = host.fork("session_commit", key)
    assert child["answer"]["result"] is not None
    child = host.fork("leave_block", f"{key}2")
    assert child["answer"]["result"] is not None
