"""Warnings of what is idle in its transaction, and metrics, in real workers; the code of docs/observing.md."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, text
from support import databases
from support.apps import make_app
from support.databases import PostgreSQL
from support.docs import DOCS
from support.waiting import eventually
from support.worker import Site, Worker, running

from celery_alchemy import Alchemy, ConfigurationError, DatabaseTask
from celery_alchemy.strategies.registry import open_units
from celery_alchemy.strategies.watching.report import describe
from celery_alchemy.workers.watching import observers
from celery_alchemy.workers.watching.idle_watch import IdleWatch

POOLS = {"prefork": 2, "threads": 3, "gevent": 4, "eventlet": 4, "solo": 1}
SETTINGS = {"alchemy_warn_idle_s": 0.4, "alchemy_metrics": "support.project.metrics:observer"}


@pytest.fixture(scope="module", params=POOLS)
def worker(request: pytest.FixtureRequest, site: Site, run_database: PostgreSQL) -> Iterator[Worker]:
    name = f"{site.prefix[:-1]}-observed-{request.param}"
    worker = Worker(
        site, name, request.param, database_url=run_database.url(name), concurrency=POOLS[request.param],
        modules=("endings", "observed", "leaks"), settings=SETTINGS,
    )  # fmt: skip
    with running(worker):
        yield worker
    databases.assert_no_connections(run_database, name)


def wait_a_second() -> None:
    time.sleep(1)


def warnings(worker: Worker) -> list[str]:
    return [line for line in worker.log().splitlines() if "has been idle in its transaction" in line]


def test_an_idle_transaction_is_named_once(worker: Worker, key: str) -> None:
    before = len(warnings(worker))
    task_id = worker.send("wait_in_transaction", key, 2)
    eventually(lambda: len(warnings(worker)) == before + 1, "it is named")
    assert worker.while_all_wait(key, 2, lambda: True)
    assert worker.wait(task_id).state == "SUCCESS"
    (said,) = warnings(worker)[before:]
    assert f"wait_in_transaction[{task_id}]" in said
    assert "after 2 statements, the last: SELECT ? AS secret." in said
    assert "the last one" not in worker.log()
    # Another request of the same task within the minute.
    other = f"{key}-other"
    task_id = worker.send("wait_in_transaction", other, 2)
    worker.while_all_wait(other, 2, wait_a_second)
    assert worker.wait(task_id).state == "SUCCESS"
    assert len(warnings(worker)) == before + 1


def test_neither_a_slow_statement_nor_slow_work_outside_a_transaction_is_idle(worker: Worker, key: str) -> None:
    before = len(warnings(worker))
    assert worker.call("wait_in_statement", key, 1).state == "SUCCESS"
    task_id = worker.send("wait_after_commit", key, 2)
    worker.while_all_wait(key, 2, wait_a_second)
    assert worker.wait(task_id).state == "SUCCESS"
    assert len(warnings(worker)) == before


@pytest.mark.parametrize("kind", ["in_a_unit_of_work", "on_a_connection", "after_its_transaction"])
def test_a_helper_thread_that_outlives_its_task_is_warned_of(worker: Worker, key: str, kind: str) -> None:
    def idle() -> list[str]:
        return [line for line in warnings(worker) if "the last: SELECT ?" in line]

    before = len(idle())
    assert worker.call("leave_a_helper", kind, key, 2).state == "SUCCESS"
    if kind == "after_its_transaction":
        worker.while_all_wait(key, 2, wait_a_second)
    else:
        worker.while_all_wait(key, 2, lambda: eventually(lambda: len(idle()) > before, "it is warned of"))
    assert len(idle()) == before + (kind != "after_its_transaction")


def test_an_observer_is_told(worker: Worker, key: str) -> None:
    told_key = f"metrics-{worker.name}"
    worker.said(told_key)
    assert worker.call("server_pid").state == "SUCCESS"
    assert worker.call("fail", key).state == "FAILURE"
    assert worker.call("keep_a_connection").state == "SUCCESS", "an observer that fails, fails no task"
    told: list[dict[str, Any]] = []

    def all_told() -> bool:
        told.extend(worker.said(told_key))
        return {"leaks": 1} in told

    eventually(all_told, "it was told")
    units = {one["task"]: one for one in told if "task" in one}
    assert units["server_pid"]["outcome"] == "committed"
    assert units["server_pid"]["statements"] == 1
    assert units["fail"]["outcome"] == "rolled back"
    assert 0 < units["server_pid"]["s"] < 30
    assert {one["database"] for one in told if "database" in one} == {"default"}
    eventually(lambda: "alchemy_metrics: the observer failed" in worker.log(), "the log says so")


# -- without a worker ------------------------------------------------------------------------------------------------


@pytest.fixture
def observed() -> Iterator[None]:
    yield
    observers.use(None)


@pytest.mark.usefixtures("observed")
def test_opentelemetry(run_database: PostgreSQL) -> None:
    from opentelemetry import metrics as api
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    api.set_meter_provider(MeterProvider([reader]))
    app, db = make_app(run_database.url("metrics"))
    observers.start("opentelemetry")

    @app.task(base=DatabaseTask, bind=True, name="shop.count")
    def count(self: Any) -> None:
        self.db.execute(text("SELECT 1"))
        self.db.execute(text("SELECT 2"))

    for _ in range(3):
        count.apply().get()
    with db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
        data: Any = reader.get_metrics_data()
    points = {
        metric.name: metric.data.data_points
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    (duration,) = points["celery_alchemy.unit_of_work.duration"]
    assert duration.attributes == {"task": "shop.count", "outcome": "committed"}
    assert duration.count == 3
    (statements,) = points["celery_alchemy.unit_of_work.statements"]
    assert statements.sum == 6
    assert points["celery_alchemy.checkout.wait"][0].count == 4
    in_use = {point.attributes["database"]: point.value for point in points["celery_alchemy.connections.in_use"]}
    assert in_use["default"] >= 0
    db.stop()


@pytest.mark.usefixtures("observed")
def test_the_page_on_prometheus(run_database: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client import REGISTRY, generate_latest

    page = (DOCS / "observing.md").read_text()
    (code,) = [
        block for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S) if "shop_metrics.py" in block
    ]
    (tmp_path / "shop_metrics.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    app, db = make_app(run_database.url("metrics"))
    observers.start("shop_metrics:observer")

    @app.task(base=DatabaseTask, bind=True, name="shop.count")
    def count(self: Any) -> None:
        self.db.execute(text("SELECT 1"))

    count.apply().get()
    said = generate_latest(REGISTRY).decode()
    assert 'unit_of_work_seconds_count{outcome="committed",task="shop.count"} 1.0' in said
    assert 'checkout_wait_seconds_count{database="default"} 1.0' in said
    db.stop()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alchemy_warn_idle_s", 0, "alchemy_warn_idle_s is 0, but it must be a number of seconds above 0"),
        ("alchemy_metrics", "prometheus", "alchemy_metrics is 'prometheus', but it must be 'opentelemetry' or 'pack"),
    ],
)
def test_bad_settings(name: str, value: Any, message: str) -> None:
    _, db = make_app("sqlite://", changes={name: value})
    with pytest.raises(ConfigurationError, match=message):
        db.strategy  # noqa: B018


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("nowhere.at_all:observer", "cannot be imported: ModuleNotFoundError"),
        ("celery_alchemy:Alchemy", "has no method unit_ended, waited, leaked"),
    ],
)
def test_bad_observers(setting: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        observers.start(setting)
    assert observers.current() is None


def test_many_gaps_of_one_task_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    now: list[dict[str, Any]] = []
    watch = IdleWatch(1, lambda: [(1, one) for one in now])
    for number in range(5):
        now[:] = [
            {
                "task": "t",
                "id": str(number),
                "state": "idle in transaction",
                "since_s": 2.0,
                "statements": 1,
                "statement": "s",
            }
        ]
        watch.look()
        watch.look()
    now[:] = [{**now[0], "task": "other"}, {**now[0], "since_s": 0.5}, {**now[0], "state": "in a statement"}]
    watch.look()
    assert [record.getMessage().partition("[")[0] for record in caplog.records] == ["t", "other"]


@pytest.mark.parametrize("poolclass", [None, NullPool])
def test_what_is_in_a_transaction(run_database: PostgreSQL, poolclass: Any) -> None:
    options: dict[str, Any] = {"poolclass": poolclass} if poolclass else {}
    two = {"reports": {"url": run_database.url("metrics"), "engine_options": options}}
    changes = {"alchemy_engine_options": options, "alchemy_databases": two}
    _, db = make_app(run_database.url("metrics"), changes=changes)
    one = text("SELECT 1")

    def state() -> str:
        (mine,) = [one for one in open_units() if one.label.startswith("unit_of_work()")]
        return str(describe(mine, mine.began)["state"])

    with db.unit_of_work() as session:
        assert state() == "no transaction"
        with session.begin():
            session.execute(one)
            assert state() == "idle in transaction"
        assert state() == "no transaction"
        with db.engine.begin() as connection:
            connection.execute(one)
            assert state() == "idle in transaction"
        assert state() == "no transaction"
        if poolclass is None:
            session.execute(one)
            db.databases["reports"].session.execute(one)
            db.databases["reports"].session.commit()
            assert state() == "idle in transaction"
            session.commit()
            assert state() == "no transaction"
    with db.unit_of_work(read_only=True) as session:
        session.execute(one)
        assert state() == "no transaction"
    for name in db.databases:
        db.databases[name].stop()


def test_units_are_forgotten_when_they_end(run_database: PostgreSQL) -> None:
    db: Alchemy
    _, db = make_app(run_database.url("metrics"))
    before = len(open_units())
    with pytest.raises(ZeroDivisionError), db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
        (mine,) = [one for one in open_units() if one.label.startswith("unit_of_work()")]
        assert describe(mine, mine.began)["state"] == "idle in transaction"
        session.rollback()
        assert describe(mine, mine.began)["state"] == "no transaction"
        raise ZeroDivisionError
    assert len(open_units()) == before
    db.stop()


def test_a_strange_id_is_made_fit_for_every_answer_and_log(run_database: PostgreSQL) -> None:
    app, db = make_app(run_database.url("metrics"))

    @app.task(base=DatabaseTask, bind=True, name="shop.\ud800")
    def look(self: Any) -> dict[str, Any]:
        self.db.execute(text("SELECT 1"))
        (mine,) = [one for one in open_units() if one.label.startswith("shop.")]
        return describe(mine, mine.began)

    found = look.apply(task_id="a\0b\nc\udcff задача").get()
    assert (found["task"], found["id"]) == ("shop.?", "a?b?c? задача")
    db.stop()
