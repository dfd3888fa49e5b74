"""What other code puts on Engines reaches ours: tools that trace SQLAlchemy, listeners on `db.engine` at import."""

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import databases
from support import worker as workers

PROCESSES = {"prefork": 2}


@contextlib.contextmanager
def traced(
    site: workers.Site, database: databases.PostgreSQL, folder: Path, pool: str, when: str, strategy: str | None = None
) -> Iterator[workers.Worker]:
    name = f"{site.prefix[:-1]}-{pool}-{when}-{strategy}"
    worker = workers.Worker(
        site,
        name,
        pool,
        database_url=database.url(name),
        strategy=strategy,
        concurrency=1 if pool == "solo" else 2,
        settings={"imports": ["scripts.traced_tasks"]},
        environment={"TRACED": when, "SPANS": str(folder)},
        modules=("endings", "sessions"),
    )
    with workers.running(worker):
        yield worker
    databases.assert_no_connections(database, name)


def spans_of(folder: Path, pids: set[int]) -> list[str]:
    """Return the statements of the spans that these processes have written."""
    return [ast.literal_eval(line) or "" for pid in pids for line in (folder / str(pid)).read_text().splitlines()]


CASES = [
    ("prefork", "import", None),
    ("prefork", "worker_process_init", None),
    ("prefork", "worker_process_init", "local"),
    ("prefork", "engine", None),
    ("threads", "import", None),
    ("threads", "worker_init", None),
    ("gevent", "import", None),
    ("eventlet", "worker_init", None),
    ("solo", "import", None),
    ("solo", "worker_process_init", "per_process"),
]


@pytest.mark.parametrize(("pool", "when", "strategy"), CASES)
def test_opentelemetry_traces_each_statement_once(
    site: workers.Site, database: databases.PostgreSQL, key: str, tmp_path: Path, pool: str, when: str, strategy: Any
) -> None:
    """With the package itself, switched on as its documentation says."""
    with traced(site, database, tmp_path, pool, when, strategy) as worker:
        outcomes = worker.call_together("traced", [(key, f"task {number}") for number in range(4)])
        assert [outcome.state for outcome in outcomes] == ["SUCCESS"] * 4, outcomes
        spans = spans_of(tmp_path, {outcome.value for outcome in outcomes})
    for word in ("INSERT INTO rows_", "SELECT rows_.note"):
        assert len([one for one in spans if one.startswith(word)]) == 4, spans


@pytest.fixture(scope="module")
def prefork(
    site: workers.Site, database: databases.PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[workers.Worker]:
    """Listeners are put on `db.engine` at import; the strategy is the one that makes another in each pool process."""
    with traced(site, database, tmp_path_factory.mktemp("spans"), "prefork", "engine") as worker:
        yield worker


def test_listeners_put_on_the_engine_at_import_fire_in_pool_processes(prefork: workers.Worker) -> None:
    """On the Engine, its connection pool and its dialect; execution options are kept too. So do those that a tool puts
    on the class Engine in the pool process."""
    outcome = prefork.call("listened")
    assert outcome.value["heard"] == ["checkin", "class", "commit", "connecting", "pool", "statement"]
    assert outcome.value["statement"].endswith("/* listened */")
    assert outcome.value["statement"].count("listened") == 1
    assert outcome.value["option"] == "kept"


def test_a_sessionmaker_bound_to_the_engine_at_import_warns(prefork: workers.Worker) -> None:
    """Once for each process, with the line; it works."""
    for _ in range(4):
        assert prefork.call("used_early").value is True
    warnings = [line for line in prefork.log().splitlines() if "uses an Engine that was db.engine before" in line]
    assert 1 <= len(warnings) <= 2, warnings
    assert "traced_tasks.py" in warnings[0]
    assert "in used_early" in warnings[0]
    assert len(warnings) == len({line.split("ForkPoolWorker-")[1].split("]")[0] for line in warnings})


def test_on_engine_in_a_pool_process_hears_of_its_engine_alone(prefork: workers.Worker) -> None:
    """Registered in worker_process_init it is called once; registered at import, once more in each pool process."""
    assert prefork.call("listened").state == "SUCCESS"
    prepared = prefork.call("who_prepared").value
    assert [tuple(one) for one in prepared if one[1]] == [("import", True, True), ("pool process", True, True)]
    assert [one for one in prepared if one[0] == "pool process" and not one[1]] == []


def test_on_engine_with_an_engine_that_stays_over_the_fork(
    site: workers.Site, database: databases.PostgreSQL, tmp_path: Path
) -> None:
    """`local` keeps what code asked for at import: a listener of import is called for it once, in the main process,
    one of worker_process_init once in each pool process."""
    with traced(site, database, tmp_path, "prefork", "engine", "local") as worker:
        prepared = [tuple(one) for one in worker.call("who_prepared").value]
    assert prepared == [("import", False, True), ("pool process", True, True)]
