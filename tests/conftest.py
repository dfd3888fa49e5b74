"""Fixtures of the whole suite: servers, a database and a Redis prefix of this run, one real worker per pair."""

import gc
import json
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from celery import _state
from celery.result import allow_join_result
from hypothesis import HealthCheck, settings
from sqlalchemy import URL

# A shell leaves SIGINT and SIGQUIT ignored to what it starts in the background, and so to all that starts.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())

# What is imported and collected stays: to look through it again and again for garbage takes a sixth of the time.
gc.disable()

# Hundreds of processes import our modules: each would compile them again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("a busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("a busy machine")

pytest.register_assert_rewrite("support")

from support import again, covering, databases, preloaded, scheduling, servers  # noqa: E402
from support import worker as workers  # noqa: E402

STRATEGIES = ("local", "scoped", "per_process")
WORKER_POOLS = ("prefork", "threads", "gevent", "eventlet", "solo")


class Pair(NamedTuple):
    """A strategy under a worker pool; "per_loop" is that of `async def` tasks."""

    strategy: str
    pool: str

    def __str__(self) -> str:
        return f"{self.strategy}-{self.pool}"


PAIRS = [Pair(strategy, pool) for pool in WORKER_POOLS for strategy in STRATEGIES]
AWAITING = "per_loop"
AWAITING_PAIRS = [Pair(AWAITING, pool) for pool in ("prefork", "threads", "solo", "asyncio")]
IN_THREADS = [Pair("scoped", "asyncio")]
"""Ordinary tasks under --pool=asyncio."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tests",
        choices=["covering", "rest", "full"],
        default="full",
        help="the covering set, what the full run has beyond it, or both (support/covering.py)",
    )
    parser.addoption(
        "--list-tests", type=Path, help="write there which tests there are, and which the covering set has"
    )
    again.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "def_only(*values): the contract test, or its cases with one of these values, needs `def` tasks"
    )
    config.addinivalue_line("markers", "worker_pools(*names): the contract test runs under these worker pools only")
    again.configure(config)
    preloaded.enabled = config.getoption("tests") == "covering"
    if preloaded.enabled:
        places = [str(workers.TESTS / "support" / "light"), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))


def pytest_unconfigure() -> None:
    preloaded.close()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduling.Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the pairs a test is not meant for, and the tests that this run does without; a skip would have to be
    explained to nobody."""
    meant = [item for item in items if is_meant_for_its_pair(item)]
    cases = [case_of(item) for item in meant]
    covers = covering.choose(cases)
    if file := config.getoption("list_tests"):
        file.write_text(json.dumps(covering.listed(cases, covers)))
    if is_whole(config, cases):
        config.stash[covering.COLLECTED] = lambda: covering.listed(cases, covers)
    wanted = {"covering": {True}, "rest": {False}, "full": {True, False}}[config.getoption("tests")]
    kept = [item for item, covered in zip(meant, covers, strict=True) if covered in wanted]
    if only := config.getoption("only"):
        kept = [item for item in kept if item.nodeid in only]
    dropped = {id(item) for item in items} - {id(item) for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in dropped])
    items[:] = scheduling.longest_first(kept) if hasattr(config, "workerinput") else kept


def is_whole(config: pytest.Config, cases: Sequence[covering.Case]) -> bool:
    """Return whether this run has collected every test, whichever of them it then runs."""
    chosen = config.getoption("lf", False) or any("::" in argument for argument in config.args)
    modules = {path.relative_to(workers.TESTS).as_posix() for path in workers.TESTS.rglob("test_*.py")}
    return not chosen and modules == {case.module for case in cases}


def is_meant_for_its_pair(item: pytest.Item) -> bool:
    if needs_def(item) and any(getattr(value, "strategy", "") == AWAITING for value in parameters_of(item).values()):
        return False
    marker = item.get_closest_marker("worker_pools")
    pools = {value.pool for value in parameters_of(item).values() if hasattr(value, "pool")}
    return marker is None or pools <= set(marker.args)


def needs_def(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("def_only")
    values = [value for value in parameters_of(item).values() if isinstance(value, str)]
    return marker is not None and (not marker.args or bool({*marker.args} & {*values}))


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def case_of(item: pytest.Item) -> covering.Case:
    """Return what decides whether the covering set has this test."""
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    return covering.Case(
        item.path.relative_to(workers.TESTS).as_posix(),
        getattr(item, "originalname", item.name),
        parameters_of(item),
        [[part.strip() for part in name.split(",")] if isinstance(name, str) else name for name in names],
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show the end of the worker's log with every failure."""
    report = yield
    if report.failed:
        for worker in workers.ALIVE:
            report.sections.append((f"log of {worker.name}", worker.log_tail()))
    return report


@pytest.fixture(scope="session")
def run_name() -> str:
    """The name of this test run: part of every name that a shared server sees."""
    return f"ca_{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def site(run_name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[workers.Site]:
    with (
        servers.redis_server() as urls,
        redis.Redis.from_url(urls.client, decode_responses=True, socket_timeout=None) as client,
    ):
        prefix = f"{run_name}:"
        yield workers.Site(urls, prefix, tmp_path_factory.mktemp("workers"), client)
        keys = list(client.scan_iter(f"{prefix}*", count=1000))
        if keys:
            client.delete(*keys)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[URL]:
    with servers.postgresql() as url:
        yield url


@pytest.fixture(scope="session")
def run_database(postgresql_server: URL, run_name: str) -> Iterator[databases.PostgreSQL]:
    """The PostgreSQL database of this run, with the project's tables."""
    with databases.new_postgresql(postgresql_server, run_name) as database:
        yield database


@pytest.fixture(scope="session")
def database(run_database: databases.PostgreSQL) -> databases.PostgreSQL:
    """The database of the tests; a module that tests another overrides this one."""
    return run_database


@pytest.fixture(scope="module")
def there(postgresql_server: URL, run_name: str) -> Iterator[databases.PostgreSQL]:
    """Another database, for tests with several."""
    with databases.new_postgresql(postgresql_server, f"{run_name}_{uuid.uuid4().hex[:4]}") as database:
        yield database


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    """A MariaDB database of one module."""
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_{uuid.uuid4().hex[:4]}") as database:
        yield database


@pytest.fixture
def key() -> str:
    """What the rows of one test have in common."""
    return uuid.uuid4().hex


@pytest.fixture
def watched_key() -> str:
    """A key whose every message makes the sending worker say what everyone could see at that moment."""
    return f"watched-{uuid.uuid4().hex}"


@pytest.fixture
def taken(key: str, database: databases.Database) -> str:
    """A user name that exists already."""
    database.execute("INSERT INTO users (name) VALUES (:name)", name=key)
    return key


@pytest.fixture
def lockable(watched_key: str, database: databases.Database) -> str:
    """A watched key with a counter row to lock."""
    database.execute("INSERT INTO counters (key_, value) VALUES (:key, 0)", key=watched_key)
    return watched_key


@pytest.fixture(scope="session", params=[*PAIRS, *AWAITING_PAIRS, *IN_THREADS], ids=str)
def worker(
    request: pytest.FixtureRequest, site: workers.Site, database: databases.PostgreSQL
) -> Iterator[workers.Worker]:
    """The worker of one pair, for all contract tests; afterwards the server lists no connection of it."""
    pair: Pair = request.param
    name = f"{site.prefix[:-1]}-{pair}"
    with workers.running(
        workers.Worker(
            site,
            name,
            pair.pool,
            database_url=database.url(name),
            strategy=pair.strategy if pair.strategy != AWAITING else None,
            awaits=pair.strategy == AWAITING,
        )
    ) as worker:
        assert worker.call("untouched").state == "SUCCESS"
        worker.connections_when_untouched = database.connections(name)
        yield worker
    databases.assert_no_connections(database, name)


@pytest.fixture(autouse=True)
def results_may_be_waited_for() -> Iterator[None]:
    """A worker that a test starts in this process forbids `result.get()` for good."""
    with allow_join_result():
        yield


@pytest.fixture(scope="session")
def shared_tasks() -> frozenset[Any]:
    """What the modules of the tests have for every app that is made."""
    return frozenset(_state._on_app_finalizers)


@pytest.fixture(autouse=True)
def no_tasks_of_other_tests(shared_tasks: frozenset[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery gives a task to every app that is made later (`shared`); those of other tests are not for this one."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set(shared_tasks))


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test of a worker nothing is checked out in any of its processes, and no transaction is open."""
    if "worker" not in request.fixturenames:
        yield
        return
    worker, database = request.getfixturevalue("worker"), request.getfixturevalue("database")
    yield
    databases.assert_not_busy(database, worker.name)
    for report in worker.probe():
        assert report["checkedout"] == 0, f"a connection was not given back: {report}"
