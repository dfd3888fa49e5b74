"""The outbox: a message is of the transaction that it was registered in, by whatever way that is committed."""

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, create_engine, event, inspect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from support.databases import PostgreSQL
from support.outbox import TABLE, Shop
from support.outbox_drivers import DRIVERS, shop_of
from support.project.models import Row

from celery_alchemy import CeleryAlchemyError, ConfigurationError, late, outbox_table
from celery_alchemy.strategies.features import outbox as rows
from celery_alchemy.strategies.features import outbox_table as outbox_tables
from celery_alchemy.workers.sending import outbox


@pytest.fixture(params=DRIVERS)
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    """An app with an outbox, with each driver."""
    with shop_of(request.param, request, tmp_path) as shop:
        yield shop


@pytest.fixture
def sends_when_inserted(shop: Shop) -> Iterator[None]:
    """A Row tells of itself by a mapper event: in the flush, and so in the flush of the COMMIT."""

    def inserted(mapper: Any, connection: Any, row: Row) -> None:
        shop.note.apply_async_on_commit((row.note,), session=Session.object_session(row))

    event.listen(Row, "after_insert", inserted)
    yield
    event.remove(Row, "after_insert", inserted)


def unit_end(shop: Shop, add: Callable[[Session], None]) -> None:
    with shop.db.unit_of_work() as session:
        add(session)


def explicit_commit(shop: Shop, add: Callable[[Session], None]) -> None:
    with shop.db.unit_of_work() as session:
        add(session)
        session.commit()


def begin_block(shop: Shop, add: Callable[[Session], None]) -> None:
    with shop.db.unit_of_work() as session, session.begin():
        add(session)


def foreign_session(shop: Shop, add: Callable[[Session], None]) -> None:
    with Session(shop.db.engine) as session:
        add(session)
        session.commit()


def foreign_begin(shop: Shop, add: Callable[[Session], None]) -> None:
    with Session(shop.db.engine) as session, session.begin():
        add(session)


def foreign_connection(shop: Shop, add: Callable[[Session], None]) -> None:
    """The Session commits nothing: its transaction is the connection's."""
    with shop.db.engine.begin() as connection, Session(connection) as session:
        add(session)
        session.commit()


def foreign_savepoint(shop: Shop, add: Callable[[Session], None]) -> None:
    with (
        shop.db.engine.begin() as connection,
        Session(connection, join_transaction_mode="create_savepoint") as session,
    ):
        add(session)
        session.commit()


WAYS = [
    unit_end, explicit_commit, begin_block, foreign_session, foreign_begin, foreign_connection, foreign_savepoint,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_a_mapper_event_sends_is_of_the_transaction(
    shop: Shop, way: Any, key: str, sends_when_inserted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the flush of the COMMIT too, which comes after the COMMIT has begun."""
    with shop.broker_gone(monkeypatch):
        way(shop, lambda session: session.add(Row(key=key, note="told")))
    assert shop.database.rows(key) == ["told"]
    assert len(shop.waiting()) == 1, "the row of the message is there, whatever becomes of this process"
    assert shop.arguments() == []
    shop.make_due()
    assert outbox.send_waiting(shop.db) == (1, 0)
    assert shop.arguments() == [["told"]]


@pytest.mark.parametrize("way", WAYS)
def test_what_fails_in_the_commit_sends_nothing(shop: Shop, way: Any, key: str, sends_when_inserted: None) -> None:
    def add(session: Session) -> None:
        session.add(Row(id=4711, key=key, note="told"))
        session.flush()
        session.expunge_all()
        session.add(Row(id=4711, key=key, note="again"))  # its flush fails, in the COMMIT

    with pytest.raises(IntegrityError):
        way(shop, add)
    assert shop.waiting() == []
    assert shop.arguments() == []


@pytest.mark.parametrize("own", [False, True])
def test_autocommit_is_refused(shop: Shop, key: str, own: bool) -> None:
    """The work is committed by then, and the message would not be undone with it."""
    if shop.db.engine.dialect.name == "sqlite":
        pytest.skip("its driver is in autocommit where BEGIN is sent as a statement")
    with (
        pytest.raises(ConfigurationError, match=r"note waits .* AUTOCOMMIT"),
        Session(shop.db.engine) if own else shop.db.unit_of_work() as session,
    ):
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        session.add(Row(key=key))
        shop.note.apply_async_on_commit(("told",), session=session)
        session.commit()
    assert shop.waiting() == []
    assert shop.arguments() == []


def test_the_row_is_of_the_same_transaction_on_the_server(run_database: PostgreSQL, key: str) -> None:
    shop = Shop(run_database, alchemy_outbox="relay")
    for way in (unit_end, explicit_commit, begin_block, foreign_session, foreign_begin):

        def add(session: Session) -> None:
            session.add(Row(key=key))
            shop.note.apply_async_on_commit((1,), session=session)

        way(shop, add)
    written = run_database.column(f"SELECT xmin::text FROM rows_ WHERE key_ = '{key}' ORDER BY id")
    assert written == run_database.column(f"SELECT xmin::text FROM {TABLE} ORDER BY id")
    assert len(set(written)) == 5
    shop.stop()


def test_a_block_that_begins_after_the_message(shop: Shop, key: str) -> None:
    """`with session.begin()` begins the transaction: nothing of ours may have begun it before."""
    with shop.db.unit_of_work() as session:
        shop.note.delay_on_commit("before")
        with session.begin():
            session.add(Row(key=key))
            shop.note.delay_on_commit("inside")
        assert shop.arguments() == [["before"], ["inside"]]
    with shop.db.unit_of_work() as session:
        shop.note.delay_on_commit("before")
        with contextlib.suppress(ZeroDivisionError), session.begin():
            raise ZeroDivisionError
    assert shop.arguments() == []
    assert shop.waiting() == []


@pytest.mark.parametrize("begins_itself", [True, False], ids=["autobegin", "no-autobegin"])
def test_a_block_of_an_engine_that_is_not_known_yet(shop: Shop, key: str, begins_itself: bool) -> None:
    """To ask its server who that is begins nothing on the Session."""
    engine = create_engine(shop.db.engine.url)
    try:
        with Session(engine, autobegin=begins_itself) as session:
            shop.note.apply_async_on_commit((key,), session=session)
            with session.begin():
                session.add(Row(key=key, note=key))
                assert shop.arguments() == []
        assert shop.arguments() == [[key]]
    finally:
        engine.dispose()


def test_a_unit_of_work_that_does_not_commit_by_itself(shop: Shop, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`commit_on_success=False`: the message is of the transaction that its code commits."""
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work(commit=False) as session:
        session.add(Row(key=key))
        shop.note.delay_on_commit("committed")
        session.commit()
        session.add(Row(key=key))
        shop.note.delay_on_commit("rolled back")
    assert len(shop.waiting()) == 1
    with shop.db.unit_of_work(commit=False):
        shop.note.delay_on_commit("without a transaction")
    assert ["without a transaction"] in shop.arguments()


def test_a_unit_of_work_that_does_nothing_else(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its message is written all the same: the broker may be gone."""
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work():
        shop.note.delay_on_commit("alone")
    assert len(shop.waiting()) == 1


@pytest.mark.parametrize("whose", ["Session", "all Sessions"])
@pytest.mark.parametrize("argument", [1, late(lambda: 1)], ids=["plain", "late"])
@pytest.mark.parametrize("is_followed", [False, True])
def test_a_listener_of_the_commit_sends(
    shop: Shop, key: str, monkeypatch: pytest.MonkeyPatch, is_followed: bool, argument: Any, whose: str
) -> None:
    """Of `before_commit` it is of this transaction; of `after_commit` it has one of its own."""

    class Own(Session):
        """What listens to its class is heard by the Sessions of this test alone."""

    with shop.broker_gone(monkeypatch), Own(shop.db.engine) as session:
        session.add(Row(key=key))
        if is_followed:
            shop.note.apply_async_on_commit((0,), session=session)
        event.listen(
            session if whose == "Session" else Own,
            "before_commit",
            lambda session: shop.note.apply_async_on_commit((argument,), session=session),
            once=True,
        )
        session.commit()
    assert sum(map(len, shop.waiting())) == 1 + is_followed
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work() as session:
        session.add(Row(key=key))
        event.listen(session, "after_commit", lambda session: shop.note.delay_on_commit(2), once=True)
    assert len(shop.waiting()) == 2


def test_several_thousand_messages_are_one_statement(
    run_database: PostgreSQL, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a thousand of them; sent in their order."""
    shop = Shop(run_database)
    statements: list[str] = []
    event.listen(shop.db.engine, "before_cursor_execute", lambda c, cursor, sql, *_: statements.append(sql))
    with shop.broker_gone(monkeypatch), shop.db.unit_of_work():
        for number in range(1500):
            shop.note.delay_on_commit(number)
    assert len([sql for sql in statements if sql.startswith("INSERT")]) == 2
    shop.make_due()
    while any(outbox.send_waiting(shop.db)):
        pass
    assert shop.arguments() == [[number] for number in range(1500)]
    shop.stop()


def test_in_the_transaction_of_a_test(run_database: PostgreSQL, key: str) -> None:
    """What a task commits there is sent at once, though nothing is ever committed."""
    shop = Shop(run_database)
    with shop.db.one_transaction() as session:
        with shop.db.unit_of_work():
            shop.note.delay_on_commit(1)
            assert shop.arguments() == []
        assert shop.arguments() == [[1]]
        assert rows.count(session, rows.chosen_table()).waiting == 0
        with contextlib.suppress(ZeroDivisionError), shop.db.unit_of_work():
            shop.note.delay_on_commit(2)
            raise ZeroDivisionError
    assert shop.arguments() == []
    assert shop.waiting() == []
    shop.stop()


def test_inside_a_unit_of_work_of_another_database(shop: Shop, tmp_path: Path, key: str) -> None:
    """The outbox is in the default database, whichever is in use; what another one commits goes out after that."""
    app_url = shop.app.conf.alchemy_database_url
    several = Shop(shop.database, app_url, alchemy_databases={"reports": f"sqlite:///{tmp_path}/reports.db"})
    with several.db.databases["reports"].unit_of_work(), Session(several.db.engine) as session:
        session.add(Row(key=key))
        several.note.apply_async_on_commit(("of the default",), session=session)
        several.note.delay_on_commit("of the other")
        session.commit()
        assert several.arguments() == [["of the default"]]
    assert several.arguments() == [["of the other"]]
    assert several.waiting() == []
    several.db.databases["reports"].stop()
    several.stop()


def test_an_async_session(run_database: PostgreSQL, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop does not wait for the broker: a thread sends."""
    shop = Shop(run_database)

    async def serve(ending: str) -> None:
        engine = create_async_engine(run_database.url("async"))
        async with AsyncSession(engine) as session:
            session.add(Row(key=key))
            shop.note.apply_async_on_commit((ending,), session=session)
            await (session.commit() if ending == "commit" else session.rollback())
        await engine.dispose()

    asyncio.run(serve("rollback"))
    asyncio.run(serve("commit"))
    outbox._background().submit(int).result(30)  # what comes after it is done when it is
    assert shop.arguments() == [["commit"]]
    assert shop.waiting() == []
    shop.stop()


# -- where it is -----------------------------------------------------------------------------------------------------


def test_a_session_of_another_database_is_refused(shop: Shop, tmp_path: Path, key: str) -> None:
    """At the call: its COMMIT is not the outbox's. The same database by another URL is the same."""
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    with Session(other) as session, pytest.raises(CeleryAlchemyError, match="The Session that was given is of"):
        shop.note.apply_async_on_commit((1,), session=session)
    url = shop.db.engine.url
    if url.host:
        url = url.set(host="localhost" if url.host == "127.0.0.1" else url.host)
    same = create_engine(url, poolclass=NullPool)
    with Session(same) as session:
        session.add(Row(key=key))
        shop.note.apply_async_on_commit((2,), session=session)
        session.commit()
    assert shop.arguments() == [[2]]
    other.dispose()


@pytest.mark.parametrize("kind", ["server", "database"])
def test_another_database_of_the_same_kind(run_database: PostgreSQL, there: PostgreSQL, kind: str) -> None:
    """It has such a table too, perhaps; texts of URLs decide nothing, the servers do."""
    shop = Shop(run_database)
    engine = create_engine(there.url("other"), poolclass=NullPool)
    for _ in range(2):
        with Session(engine) as session, pytest.raises(CeleryAlchemyError, match="could not be committed together"):
            shop.note.apply_async_on_commit((1,), session=session)
    with Session() as session, pytest.raises(CeleryAlchemyError, match="has no Engine for the outbox's table"):
        shop.note.apply_async_on_commit((1,), session=session)
    shop.stop()


@pytest.mark.parametrize("where", ["schema", "name", "both"])
def test_any_schema_and_any_name(run_database: PostgreSQL, where: str) -> None:
    schema = f"s{uuid.uuid4().hex[:6]}" if where != "name" else None
    metadata = MetaData(schema=schema)
    table = outbox_table(metadata, **({} if where == "schema" else {"name": f"m{uuid.uuid4().hex[:6]}"}))
    if schema:
        run_database.execute(f"CREATE SCHEMA {schema}")
    metadata.create_all(run_database.engine)
    shop = Shop(run_database, run_database.url("outbox"), alchemy_outbox_table=table.fullname)
    with shop.db.unit_of_work() as session:
        shop.note.delay_on_commit(1)
        assert rows.count(session, table).waiting == 0
    assert shop.arguments() == [[1]]
    with shop.db.unit_of_work() as session:
        rows.write(session, table, [rows.Message("id", "note", "{}")], lease_s=0, notify=True)
    assert outbox.send_waiting(shop.db) == (0, 1)
    shop.stop()
    metadata.drop_all(run_database.engine)
    if schema:
        run_database.execute(f"DROP SCHEMA {schema}")
    outbox_tables._tables._declared.discard(table)  # other tests are of other programs


OLD = (
    "CREATE TABLE {name} (id INTEGER PRIMARY KEY, created_at TIMESTAMP, attempts INTEGER DEFAULT 0 NOT NULL, "
    "messages TEXT NOT NULL)"
)


def test_a_table_of_an_older_version_is_told(shop: Shop, key: str) -> None:
    """With what is to be done; the transaction is not committed."""
    name = f"old{uuid.uuid4().hex[:6]}"
    shop.database.execute(OLD.format(name=name))
    old = Shop(shop.database, shop.app.conf.alchemy_database_url, alchemy_outbox_table=name)
    says = f"the table '{name}' is of an older version.*docs/outbox.md"
    with pytest.raises(ConfigurationError, match=says), old.db.unit_of_work() as session:
        session.add(Row(key=key))
        old.note.delay_on_commit(1)
    with pytest.raises(ConfigurationError, match="older version"):
        outbox.send_waiting(old.db)
    assert shop.database.rows(key) == []
    assert old.arguments() == []
    old.stop()
    shop.database.execute(f"DROP TABLE {name}")


def test_the_table_has_what_is_needed(shop: Shop) -> None:
    found = {column["name"] for column in inspect(shop.database.engine).get_columns(TABLE)}
    assert found == {column.name for column in rows.chosen_table("celery_alchemy_outbox").columns}
