"""Real gevent and eventlet workers: statements that let others run, and starts that are refused."""

import contextlib
import sys
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from support import databases, forking, green, servers
from support import worker as workers
from support.waiting import eventually

COUNT = 10
CASES = [f"{library}-{driver}" for library in green.LIBRARIES for driver in green.DRIVERS]
HERE = [case for case in CASES if all(find_spec(module) for module in case.split("-"))]


@pytest.fixture(scope="module")
def mariadb(run_name: str) -> Iterator[databases.MariaDB]:
    with databases.new_mariadb(servers.mariadb(), f"{run_name}_greenworkers") as database:
        yield database


def green_worker(site: workers.Site, library: str, database_url: str, name: str, **options: Any) -> workers.Worker:
    return workers.Worker(
        site,
        name,
        library,
        database_url=database_url,
        concurrency=COUNT + 2,
        settings={"imports": ["scripts.green_tasks"]} | options.pop("settings", {}),
        **options,
    )


@pytest.fixture(scope="module")
def green_workers(
    request: pytest.FixtureRequest, site: workers.Site, database: databases.PostgreSQL
) -> Iterator[dict[str, workers.Worker]]:
    contexts = {}
    for case in HERE:
        library, driver = case.split("-")
        name = f"{site.prefix[:-1]}-{case}"
        if driver == "pymysql":
            try:
                url = green.url_with(request.getfixturevalue("mariadb"), driver, name)
            except pytest.skip.Exception:
                continue
        else:
            url = green.url_with(database, driver, name)
        contexts[case] = workers.running(green_worker(site, library, url, name))
    with forking.side_by_side(contexts) as running:
        yield running


@pytest.mark.parametrize("case", CASES)
def test_ten_tasks_wait_for_the_server_at_once(
    case: str, green_workers: dict[str, workers.Worker], database: databases.PostgreSQL, request: pytest.FixtureRequest
) -> None:
    """Ten tasks sleep on the server at the same time, and an eleventh goes on ticking meanwhile."""
    if case not in green_workers:
        pytest.skip(f"{case}: the library, the driver or its server is not here")
    worker = green_workers[case]
    seen_in = request.getfixturevalue("mariadb") if case.endswith("pymysql") else database

    def all_at_once() -> int:
        key = uuid.uuid4().hex
        ticking = worker.send("tick", key, COUNT)
        outcomes = worker.call_together("sleep_on_server", [(key, COUNT)] * COUNT)
        assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * COUNT, outcomes
        return worker.wait(ticking).value

    assert green.all_seen_asleep(seen_in, worker.name, COUNT, all_at_once) > 10, "the other task stood still"


@contextlib.contextmanager
def refused(worker: workers.Worker, start: Any) -> Iterator[list[str]]:
    """Start a worker that must not come up, with a message in its queue that must stay there; yield its log."""
    key = f"{worker.site.prefix}{worker.queue}"
    worker.send("tick", "never", 0)
    log: list[str] = []
    try:
        start()
        eventually(lambda: not worker.is_running(), "the worker ends", within_s=40)
        assert worker.exit_code() not in {0, None}, worker.log_tail()
        assert worker.site.redis.llen(key) == 1, "a message was consumed"
        log.append(worker.log())
        yield log
    finally:
        worker.stop()


UNPATCHED = {
    "glued": (["-P{library}", "-c2"], {}, {}),
    "setting": (["-c2"], {"worker_pool": "{library}"}, {}),
    "variable": (["-c2"], {}, {"CELERY_WORKER_POOL": "{library}"}),
}


@pytest.mark.parametrize("library", green.LIBRARIES)
@pytest.mark.parametrize("how", [*UNPATCHED, "program"])
def test_unpatched_worker_does_not_start(
    site: workers.Site, database: databases.PostgreSQL, library: str, how: str
) -> None:
    """Celery patches only for some spellings of --pool; for the others the worker stops and says so."""
    forking.require(library)
    name = f"{site.prefix[:-1]}-unpatched-{library}-{how}"
    arguments, settings, variables = UNPATCHED.get(how, ([], {}, {}))
    worker = green_worker(
        site,
        library,
        database.url(name),
        name,
        pool_arguments=[argument.format(library=library) for argument in arguments],
        settings={setting: value.format(library=library) for setting, value in settings.items()},
        environment={variable: value.format(library=library) for variable, value in variables.items()},
    )

    def start_from_a_program() -> None:
        command = [sys.executable, "-m", "scripts.start_worker", library]
        worker._process = workers.start_process(command, worker.log_path, worker._project())

    with refused(worker, start_from_a_program if how == "program" else worker.start) as (log,):
        assert "not monkey patched" in log
        assert f"--pool={library}" in log


@pytest.mark.parametrize("library", green.LIBRARIES)
def test_blocking_driver_does_not_start(site: workers.Site, library: str) -> None:
    """mysqlclient waits inside C: the worker stops, and names a driver that does not."""
    forking.require(library)
    forking.require("mysqldb")
    name = f"{site.prefix[:-1]}-blocking-{library}"
    worker = green_worker(site, library, "mysql+mysqldb://nobody@127.0.0.1:1/nothing", name)
    with refused(worker, worker.start) as (log,):
        assert "mysqldb" in log
        assert "mysql+pymysql" in log
        assert "--pool=threads" in log
