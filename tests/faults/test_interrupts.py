"""Soft time limits that strike anywhere: no slot of the connection pool is lost, no half of a transaction committed."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import databases, forking, green, servers
from support.faults import SEED, amount

from celery_alchemy.strategies.interrupts import hidden_interrupt

COUNT = amount(200, 3000)
#: One strategy per driver: the strategies differ in where they keep the Session.
STRATEGIES = {"psycopg": "per_process", "psycopg2": "local", "pymysql": "scoped"}


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_interrupts") as database:
        yield database


def interrupt(script: forking.Script, database: databases.Database, name: str) -> tuple[dict[str, Any], set[str]]:
    """Interrupt tasks at random; return what the process says, and what is in the database."""
    answer = script.ask(within_s=amount(400, 3000), scenario="interrupt", key=name, count=COUNT, seed=SEED)
    databases.assert_not_busy(database, name)
    return answer, set(database.rows(name))


@pytest.fixture(scope="module")
def interrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Any]]:
    """The results of all drivers, gathered side by side: they wait for their servers half of the time."""
    results = {}
    with contextlib.ExitStack() as stack:
        executor = stack.enter_context(ThreadPoolExecutor(len(STRATEGIES)))
        for driver, strategy in STRATEGIES.items():
            if find_spec(driver) is None:
                continue
            try:
                database = request.getfixturevalue("mariadb" if driver == "pymysql" else "database")
            except pytest.skip.Exception:
                continue
            name = f"interrupts-{driver}"
            log = tmp_path_factory.mktemp(driver) / "host.log"
            url = green.url_with(database, driver, name)
            script = stack.enter_context(forking.script("interrupt_host", log, url=url, strategy=strategy))
            results[driver] = executor.submit(interrupt, script, database, name)
        for result in results.values():
            result.exception()
    return results


@pytest.mark.parametrize("driver", STRATEGIES)
@pytest.mark.timeout(amount(500, 3600))
def test_soft_limit_anywhere(interrupted: dict[str, Future[Any]], driver: str) -> None:
    """Random interruptions: every connection comes back, the next task is right, what failed is not there."""
    if driver not in interrupted:
        pytest.skip(f"{driver} or its server is not here")
    answer, written = interrupted[driver].result()
    print(f"CELERY_ALCHEMY_SEED={SEED}", answer["states"], "a task takes", answer["typical_s"], "s")
    assert answer["wrong"] == []
    assert answer["states"]["FAILURE"] > COUNT / 20, "too few were interrupted to show anything"
    for number in range(COUNT):
        parts = {f"{number} first", f"{number} second"} & written
        assert len(parts) in {0, 2}, f"half a transaction is committed: {parts}"
        assert len(parts) == 2 or number not in answer["must"], f"task {number} succeeded, its rows are not there"
        assert not parts or number not in answer["must_not"], f"task {number} failed, its rows are there"


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_unit_of_work_that_an_interruption_left_open(
    database: databases.PostgreSQL, tmp_path: Path, key: str, strategy: str
) -> None:
    """Nobody leaves a block whose `__enter__` is interrupted: the next tasks are none the worse for it."""
    name = f"abandoned-{strategy}"
    url = green.url_with(database, "psycopg", name)
    with forking.script("interrupt_host", tmp_path / "host.log", url=url, strategy=strategy) as script:
        answer = script.ask(scenario="after_abandon", key=key)
        databases.assert_not_busy(database, name)
    well = ["SUCCESS", ""]
    assert answer.pop("abandon") == "FAILURE"
    assert answer == {"commit": well, "commit afterwards": well, "collect": well, "checked_out": 0}
    assert sorted(database.rows(key)) == ["after", "before", "one", "one"]


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_limit_in_the_middle_of_a_checkout(
    database: databases.PostgreSQL, tmp_path: Path, key: str, strategy: str
) -> None:
    """A connection that was checked out, but never reached its Session, is given back all the same."""
    name = f"checkout-{strategy}"
    url = green.url_with(database, "psycopg", name)
    with forking.script("interrupt_host", tmp_path / "host.log", url=url, strategy=strategy) as script:
        answer = script.ask(scenario="interrupt_connect", key=key)
        databases.assert_not_busy(database, name)
    assert answer == {
        "task": ["FAILURE", 0],
        "after the task": ["SUCCESS", ""],
        "block": ["FAILURE", 0],
        "after the block": ["SUCCESS", ""],
    }
    assert sorted(database.rows(key)) == ["0 first", "0 first", "0 second", "0 second"]


@pytest.mark.parametrize(("message", "hides"), [((), True), (("what the task asserts",), False)])
def test_an_assertion_of_sqlalchemys_that_a_limit_has_met_is_that_limit(message: tuple[str, ...], hides: bool) -> None:
    with pytest.raises(AssertionError) as raised:
        try:
            raise SystemExit
        finally:
            raise AssertionError(*message)
    assert isinstance(hidden_interrupt(raised.value), SystemExit) == hides
