"""`celery alchemy ...` where the driver of the database can only be awaited."""

import asyncio
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, _state
from click.testing import CliRunner, Result
from sqlalchemy import URL, Column, Integer, MetaData, Table, event, inspect, make_url
from support import databases, servers
from support.async_drivers import url_for
from support.databases import Database, PostgreSQL
from support.pgbouncer import pgbouncer

from celery_alchemy import Alchemy, AsyncDatabaseTask, CeleryAlchemyError, DatabaseTask
from celery_alchemy.strategies.asynchronous import loop_thread
from celery_alchemy.strategies.worker_pool import WorkerPool
from celery_alchemy.workers.commands import alchemy
from celery_alchemy.workers.watching import observers
from celery_alchemy.workers.watching.outbox import tell


class Shop:
    """An app of `async def` tasks, and the commands below `celery alchemy`."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(alchemy_database_url=url, alchemy_outbox=True)
        self.app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True, alchemy_on_commit_outside="send")
        self.app.conf.update(settings)
        self.db = Alchemy(self.app)

        @self.app.task(base=AsyncDatabaseTask, name="create", exactly_once=True)
        async def create(name: str) -> None: ...

    def call(self, *arguments: str) -> Result:
        return CliRunner().invoke(alchemy, arguments, obj=SimpleNamespace(app=self.app))

    def doctor(self, *arguments: str) -> dict[str, str]:
        """Return what is found, by its code."""
        found = self.call("doctor", "--json", *arguments)
        assert found.stdout.startswith("{"), found.output
        return {one["code"]: f"{one['what']} {one['remedy']}" for one in json.loads(found.stdout)["findings"]}


@pytest.fixture(scope="module", params=["asyncpg", "aiomysql", "aiosqlite"])
def place(
    request: pytest.FixtureRequest, postgresql_server: URL, run_name: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Database, str]]:
    """A database of this module's own, and its URL."""
    name = f"{run_name}_awaited"
    if request.param == "asyncpg":
        opened: Any = databases.new_postgresql(postgresql_server, name)
    elif request.param == "aiomysql":
        opened = databases.new_mariadb(servers.mariadb(), name)
    else:
        opened = databases.new_sqlite(tmp_path_factory.mktemp("awaited") / "shop.sqlite3")
    with opened as database:
        yield database, url_for(request.param, database, "")[0]


@pytest.fixture(scope="session")
def shared_tasks() -> frozenset[Any]:
    """Of Celery alone: the doctor examines each task of an app, those that other modules share among them."""
    return frozenset(one for one in _state._on_app_finalizers if one.__module__ == "celery.app.builtins")


@pytest.fixture
def shop(place: tuple[Database, str]) -> Shop:
    return Shop(place[1])


@pytest.fixture(autouse=True)
def no_loop_is_left() -> Iterator[None]:
    yield
    loop_thread.stop()


@pytest.mark.parametrize("pool", ["prefork", "asyncio"])
def test_the_doctor_asks_the_server(shop: Shop, place: tuple[Database, str], pool: str) -> None:
    shop.app.conf.worker_pool = pool
    assert set(shop.doctor("-c", "1")) <= {"connections"}
    if "sqlite" not in place[1]:
        assert "max_connections" in shop.doctor("-P", pool, "--hosts", "90000")["too-many-connections"]


def test_the_doctor_looks_at_tables(shop: Shop, place: tuple[Database, str]) -> None:
    names = "celery_alchemy_outbox", "celery_alchemy_completed"
    for name in names:
        place[0].execute(f"ALTER TABLE {name} RENAME TO {name}_away")
    try:
        found = shop.doctor()
    finally:
        for name in names:
            place[0].execute(f"ALTER TABLE {name}_away RENAME TO {name}")
    assert "has no table 'celery_alchemy_outbox'" in found["outbox-table"]
    assert "has no table 'celery_alchemy_completed'" in found["completed-table"]


def test_a_task_that_such_a_driver_does_not_serve(shop: Shop) -> None:
    @shop.app.task(base=DatabaseTask, name="rename")
    def rename(name: str) -> None: ...

    found = shop.doctor("--no-connect")
    assert "A worker does not start: 1 DatabaseTask (rename)" in found["configuration"]


def test_the_other_commands(shop: Shop) -> None:
    for command, said in {
        ("outbox", "list"): "0 waiting; 0 set aside",
        ("outbox", "run", "--once"): "",
        ("completed", "list"): "0 shown",
        ("completed", "prune", "--older-than", "7d"): "0 rows deleted",
        ("in-doubt", "--wait-s", "0"): "nothing in doubt",
    }.items():
        done = shop.call(*command)
        assert (done.exit_code, done.output.strip()) == (0, said), command


def test_what_is_in_the_outbox_is_told_to_metrics(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(observers, "current", lambda: SimpleNamespace(outbox=lambda *found: told.append(found)))
    tell(shop.db)
    assert told == [(0, 0, 0.0)]


@pytest.mark.parametrize(
    ("port", "role", "code"), [(1, None, "unreachable"), (None, "nobody", "unreachable"), (None, "full", "too-many")]
)
def test_a_server_that_does_not_answer(
    run_database: PostgreSQL, run_name: str, port: int | None, role: str | None, code: str
) -> None:
    url = make_url(url_for("asyncpg", run_database, "")[0])
    name = f"{run_name}_full_awaited"
    run_database.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'secret' CONNECTION LIMIT 0")
    try:
        user = {"nobody": "no_such_role", "full": name}.get(role or "", url.username)
        url = url.set(username=user, password="secret", port=port or url.port)
        found = Shop(url.render_as_string(hide_password=False)).doctor()
    finally:
        run_database.execute(f'DROP ROLE "{name}"')
    (said,) = [text for found_code, text in found.items() if found_code.startswith(code)]
    assert "connect_args" not in said
    assert "secret" not in said


def test_a_pooler_that_the_app_does_not_know_of(
    run_database: PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = make_url(run_database.url("unused")).difference_update_query(["application_name"])
    direct = server.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
    shop = Shop(direct, alchemy_external_pooler="pgbouncer")
    assert "no-pooler" in shop.doctor()
    with pgbouncer(server, tmp_path_factory.mktemp("doctor")) as pooled:
        url = pooled.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
        shop.app.conf.alchemy_database_url = url
        assert not {"pooler", "no-pooler"} & set(shop.doctor())
        shop.app.conf.alchemy_external_pooler = None
        assert "asyncpg prepares statements" in shop.doctor()["pooler"]


def test_a_script_that_asks_for_the_engine_is_told_what_to_write(shop: Shop, place: tuple[Database, str]) -> None:
    """What the error says to write creates the tables."""
    metadata = MetaData()
    Table("made_by_a_script", metadata, Column("id", Integer, primary_key=True))
    for ask in (lambda: shop.db.engine, lambda: shop.db.async_engine):
        with pytest.raises(CeleryAlchemyError) as refused:
            ask()
        said = str(refused.value)
        assert said.startswith(f"The driver {make_url(place[1]).get_driver_name()} can only be awaited")
        assert "use db.engine" not in said
        (code,) = re.findall("`(async with .*?)`", said)
        names = {"db": shop.db, "Base": SimpleNamespace(metadata=metadata)}
        exec(f"async def main():\n    {code}\n    await db.async_engine.dispose()", names)
        asyncio.run(names["main"]())
        assert inspect(place[0].engine).has_table("made_by_a_script")
        metadata.drop_all(place[0].engine)


@pytest.mark.parametrize("first", ["coroutines", "ordinary code"])
def test_one_engine_serves_coroutines_and_ordinary_code(place: tuple[Database, str], shop: Shop, first: str) -> None:
    """Whichever asks first: a second Engine would keep a connection that nobody closes."""
    db, seen = shop.db, []
    db.on_engine(seen.append)

    async def main() -> None:
        asked = [db.async_engine.sync_engine, db.engine]
        if first == "ordinary code":
            db.stop()
            asked = [db.engine, db.async_engine.sync_engine]
        async with db.async_engine.connect():
            pass
        assert asked[0] is asked[1]
        await db.async_engine.dispose()

    asyncio.run(main())
    assert len(seen) == (1 if first == "coroutines" else 2)
    db.stop()


def test_a_worker_that_starts_closes_what_was_used_before_it(place: tuple[Database, str], shop: Shop) -> None:
    """At import time, say."""
    db, closed = shop.db, []
    thread = loop_thread.started()
    try:
        db.on_engine(lambda engine: event.listen(engine, "close", lambda *_: closed.append(engine)))
        thread.run(lambda: db.engine.connect().close())
        db.start_worker(WorkerPool(name="threads", concurrency=2))
        assert len(closed) == 1
        thread.run(lambda: db.engine.connect().close())
    finally:
        db.stop()
        loop_thread.stop()
    assert len(closed) == 2
