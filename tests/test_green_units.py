"""Units of work in many greenlets of a monkey patched process, and in threads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import databases, forking, green, servers
from support.faults import SEED, amount

HOSTS = [(library, driver) for library in green.LIBRARIES for driver in green.DRIVERS]
#: Every driver with the strategy that `auto` chooses, and the other strategies with one driver.
STRATEGIES = [(host, "scoped") for host in HOSTS] + [
    ((library, "psycopg"), strategy) for library in green.LIBRARIES for strategy in ("local", "per_process")
]
each_strategy = pytest.mark.parametrize(
    ("host", "strategy"),
    STRATEGIES,
    ids=["-".join([*host, strategy]) for host, strategy in STRATEGIES],
    indirect=["host"],
    scope="module",
)
KILLS = amount(200, 3000)
"""Greenlets of one run; three quarters of them are killed or time out."""
FIVE = {"pool_size": 5, "pool_timeout": 60}


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_green") as database:
        yield database


class Host:
    """A patched process, its database and the name by which the server knows it."""

    def __init__(self, script: forking.Script, database: databases.Database, name: str) -> None:
        self.script, self.database, self.name = script, database, name

    def play(self, scenario: str, **arguments: Any) -> Any:
        return self.script.ask(scenario=scenario, arguments=arguments)


@pytest.fixture(scope="module", params=HOSTS, ids="-".join)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    library, driver = request.param
    forking.require(library)
    forking.require(driver)
    name = f"green-{library}-{driver}"
    database = request.getfixturevalue("database" if driver.startswith("psycopg") else "mariadb")
    log = tmp_path_factory.mktemp("green") / "host.log"
    # psycopg decides at import how it waits: before the patch it decides wrongly.
    with green.host(library, log, green.url_with(database, driver, name), before=[driver]) as script:
        yield Host(script, database, name)


@pytest.fixture(autouse=True)
def nothing_busy(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "host" in request.fixturenames:
        host = request.getfixturevalue("host")
        databases.assert_not_busy(host.database, host.name)


def test_statements_do_not_block_the_others(host: Host) -> None:
    """Ten statements run on the server at once, while another greenlet goes on ticking."""
    answer = green.all_seen_asleep(host.database, host.name, 10, lambda: host.play("sleep_together", alchemy={}))
    # Counted only while all ten are in their statement: a driver that blocks lets nobody tick then.
    assert answer["ticks"] > 1, "the other greenlet stood still"
    assert answer["checked_out"] == 0


@each_strategy
def test_two_hundred_share_five_connections(host: Host, key: str, strategy: str) -> None:
    answer = host.play("share", alchemy={"strategy": strategy, **FIVE}, key=key)
    assert answer == {"done": 200, "checked_out": 0, "most": 5}
    assert sorted(host.database.rows(key), key=int) == [str(number) for number in range(200)]


@each_strategy
@pytest.mark.timeout(amount(60, 1200))
def test_killed_greenlets_lose_no_connection(host: Host, key: str, strategy: str) -> None:
    """GreenletExit and Timeout anywhere: what did not end is rolled back, nobody gets the answer of another, and all
    five connections come back."""
    answer = host.play("interrupt", alchemy={"strategy": strategy, **FIVE}, key=key, seed=SEED, count=KILLS)
    print(f"CELERY_ALCHEMY_SEED={SEED}")
    assert answer["checked_out"] == 0
    assert answer["wrong"] == []
    assert 0 < len(answer["done"]) < KILLS, "nothing was interrupted, or everything: this run shows nothing"
    assert set(answer["done"]) <= set(host.database.rows(key)) <= set(answer["ended"])


def test_nested_units_use_the_reserve(host: Host) -> None:
    """All greenlets of a full connection pool nest at once; one level deeper all are refused at once: no deadlock."""
    answer = host.play("nest", alchemy={"pool_size": 5, "pool_timeout": 600})
    assert answer == {"nested": 5, "refused": 5, "most": 10, "checked_out": 0}


def test_nested_units_without_a_reserve_are_refused(host: Host) -> None:
    answer = host.play("nest", alchemy={"pool_size": 5, "max_overflow": 0, "pool_timeout": 600})
    assert answer == {"nested": 0, "refused": 5, "most": 5, "checked_out": 0}


def test_killed_while_they_wait_for_a_connection(host: Host) -> None:
    """A greenlet that waits holds nothing, and passes on the call that came too late for it."""
    answer = host.play("kill_waiting", alchemy={"pool_size": 1, "pool_timeout": 20})
    assert answer == {"early": 0, "done": 8, "most": 2, "checked_out": 0}
    assert host.play("kill_called") == [1, 1]


def test_fork_and_subprocess_in_a_greenlet(host: Host, key: str, request: pytest.FixtureRequest) -> None:
    """A fork harms neither the forking greenlet's transaction nor another's that goes on in the child too."""
    host.play("subprocess_in_greenlet", alchemy={}, key=key)
    assert host.database.rows(key) == ["parent"]
    if request.node.callspec.params["host"][0] == "eventlet":
        return  # its hub does not survive a fork
    child = host.play("fork_in_greenlet", alchemy={}, key=f"{key}2")
    assert (child["status"], child["hung"], child.get("error")) == (0, False, None)
    assert sorted(host.database.rows(f"{key}2")) == ["child", "other", "parent"]


@pytest.fixture(scope="module", params=[*green.LIBRARIES, "threads"])
def sqlite_host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    if request.param != "threads":
        forking.require(request.param)
    folder = tmp_path_factory.mktemp("sqlite")
    with (
        databases.new_sqlite(folder / "green.db") as database,
        green.host(request.param, folder / "host.log", database.url("")) as script,
    ):
        yield Host(script, database, "")


def test_sqlite_file_counts_exactly(sqlite_host: Host, key: str) -> None:
    """Read, change, write in 20 greenlets or threads at once: no update is lost, no "database is locked"."""
    assert sqlite_host.play("count_up", alchemy={}, key=key) == {"value": 200, "checked_out": 0}


@pytest.mark.parametrize("strategy", ["scoped", "local", "per_process"])
def test_unit_left_open_dies_with_its_greenlet(sqlite_host: Host, strategy: str) -> None:
    """2000 greenlets or threads die without ending theirs: none finds a dead one's, and nothing piles up."""
    answer = sqlite_host.play("die_unremoved", alchemy={"strategy": strategy})
    assert answer["stale"] == 0
    assert answer["alive"] <= 1, "gevent may keep the last greenlet"


@pytest.mark.parametrize("library", green.LIBRARIES)
@pytest.mark.parametrize(("driver", "whose"), [("psycopg", "engine"), ("psycopg", "url"), ("pymysql", "engine")])
def test_engine_used_before_the_patch(
    request: pytest.FixtureRequest, tmp_path: Path, key: str, library: str, driver: str, whose: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its locks and sockets are of the other side of the patch; the worker pool gets a connection pool that works."""
    forking.require(library)
    forking.require(driver)
    database = request.getfixturevalue("database" if driver.startswith("psycopg") else "mariadb")
    url = green.url_with(database, driver, f"early-{library}")
    monkeypatch.setenv("EARLY_URL", url)
    monkeypatch.setenv("EARLY_WHOSE", whose)
    with green.host(library, tmp_path / "host.log", url, before=["scripts.early"]) as script:
        answer = script.ask(scenario="share_early", arguments={"key": key})
    assert answer.pop("ticks") > 0
    assert answer == {"done": 200, "checked_out": 0, "most": 5}
    assert len(database.rows(key)) == 200
