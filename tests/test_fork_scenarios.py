"""Forks in awkward places: under locks, inside units of work and tasks, from threads, twice, two hundred times."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import make_url
from support import databases, forking, servers
from support.faults import SEED, amount

FORKS = amount(100, 10_000)
STRATEGIES = ("local", "scoped", "per_process", "engine")
HOSTS = [(driver, strategy) for driver in ("psycopg", "mysqldb") for strategy in STRATEGIES]


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_scenarios") as database:
        yield database


@pytest.fixture(scope="module", params=HOSTS, ids="-".join)
def host(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[forking.Script, databases.Database]]:
    driver, strategy = request.param
    forking.require(driver)
    database = request.getfixturevalue("database" if driver.startswith("psycopg") else "mariadb")
    url = make_url(database.url("scenarios"))
    url = url.set(drivername=f"{url.get_backend_name()}+{driver}").render_as_string(hide_password=False)
    log = tmp_path_factory.mktemp("forks") / "scenarios.log"
    with forking.script("fork_scenarios", log, url=url, strategy=strategy) as script:
        yield script, database


@pytest.fixture
def play(host: tuple[forking.Script, databases.Database], key: str) -> Callable[..., Any]:
    return lambda scenario, *arguments: host[0].ask(scenario=scenario, key=key, arguments=arguments)


@pytest.fixture
def rows(host: tuple[forking.Script, databases.Database], key: str) -> Callable[..., list[str]]:
    """Return the notes of the rows of this test, in alphabetical order."""
    return lambda suffix="": sorted(host[1].rows(key + suffix))


def assert_ended_well(child: dict[str, Any]) -> None:
    assert (child["status"], child["hung"], child.get("error")) == (0, False, None)


@pytest.mark.parametrize("scenario", ["connection_pool_locked", "engine_being_made", "engine_connecting_first"])
def test_lock_held_by_another_thread(play: Any, rows: Any, scenario: str) -> None:
    """A lock that another thread of the parent held at the moment of the fork does not stop the child."""
    assert_ended_well(play(scenario))
    assert rows() == ["child", "parent"]


@pytest.mark.parametrize(
    ("scenario", "raised"),
    [
        ("inside_block_child_returns", None),
        ("inside_block_child_raises", "ZeroDivisionError"),
        ("inside_block_child_exits", "SystemExit"),
    ],
)
def test_fork_inside_a_unit_of_work(play: Any, rows: Any, scenario: str, raised: str | None) -> None:
    """Both leave the block: the parent commits; the child does not, is told so, and goes on with work of its own."""
    answer = play(scenario)
    assert answer["same"], "the parent's connection is another one"
    assert answer["child"] != "nothing was raised"
    assert raised is None or answer["child"] == raised
    assert rows() == ["child", "parent"]


def test_fork_inside_a_task(play: Any, rows: Any) -> None:
    """The child of a task has no unit of work; it opens one of its own."""
    child = play("inside_task")
    assert_ended_well(child)
    assert child["answer"][0] == "NoUnitOfWork"
    assert rows() == ["child", "parent"]


def test_child_returns_from_the_task_it_was_forked_in(play: Any, rows: Any) -> None:
    """What the parent commits, its child cannot: there the task fails."""
    assert play("inside_task_child_returns") == {"parent": "SUCCESS", "child": "FAILURE"}
    assert rows() == ["child", "parent"]


def test_grandchild(play: Any, rows: Any) -> None:
    """A grandchild harms neither its parent's transactions nor its grandparent's."""
    child, finished = play("grandchild")
    assert_ended_well(child)
    grandchild, childs = child["answer"]
    assert_ended_well(grandchild)
    for idle in (finished, childs):
        assert idle["idle_after"] == idle["idle_before"]
    assert rows() == ["connection", "grandchild", "session"]
    assert rows("-child") == ["connection", "session"]


def test_fork_from_a_thread(play: Any, rows: Any) -> None:
    """Neither the transaction of the thread that forks is harmed nor that of the main thread."""
    child, finished = play("from_thread")
    assert_ended_well(child)
    assert finished["idle_after"] == finished["idle_before"]
    assert rows() == ["child", "connection", "session"]
    assert rows("-thread") == ["connection", "session"]


def test_connection_in_a_thread_local_of_another_thread(play: Any, rows: Any) -> None:
    """A connection that only a thread-local of another thread holds is freed at the fork, and must be cut before."""
    assert_ended_well(play("thread_local_of_another_thread"))
    assert rows() == ["child", "parent"]


def test_two_threads_fork_at_once(play: Any, rows: Any) -> None:
    """The fork of one thread does not undo the other's precautions."""
    child, other, finished = play("two_threads_fork_at_once")
    assert_ended_well(child)
    assert_ended_well(other)
    assert finished["idle_after"] == finished["idle_before"]
    assert rows() == ["child", "child", "connection", "session"]


def test_subprocess_in_a_unit_of_work(play: Any, rows: Any) -> None:
    assert play("subprocess_in_block") == {"same": True}
    assert rows() == ["parent"]


def test_multiprocessing_in_a_task(play: Any, rows: Any) -> None:
    """A process that a task starts, with multiprocessing or billiard, works on a connection of its own."""
    assert play("multiprocessing_in_task") == [0, 0, 0]
    assert rows() == ["child", "child", "parent"]


def each_driver(strategy: str, drivers: tuple[str, ...] = ("psycopg", "mysqldb")) -> Any:
    hosts = [(driver, strategy) for driver in drivers]
    return pytest.mark.parametrize("host", hosts, ids="-".join, indirect=True)


@pytest.mark.timeout(amount(60, 1800))
@each_driver("per_process", drivers=("psycopg", "psycopg2", "pymysql", "mysqldb"))
def test_many_forks(host: Any, key: str, rows: Any) -> None:
    """Children do the worst, one after another; the parent's transactions stay open, and nothing piles up."""
    answer = host[0].ask(scenario="many_forks", key=key, arguments=[FORKS, SEED], within_s=amount(60, 1800))
    print(f"CELERY_ALCHEMY_SEED={SEED}")
    assert answer["bad"] == []
    assert answer["used"] > 10, "the other thread did not get to use the engine"
    assert answer["new_descriptors"] <= 0
    assert answer["finished"]["idle_after"] == answer["finished"]["idle_before"]
    assert rows() == ["connection", "session"]


@each_driver("engine")
@pytest.mark.parametrize("scenario", ["connected_before_first_use", "connected_before_alchemy"])
def test_engine_of_the_user_connected_before(play: Any, rows: Any, scenario: str) -> None:
    """What the user's Engine had open before celery-alchemy looked at it is protected all the same."""
    assert_ended_well(play(scenario))
    assert "parent" in rows()
