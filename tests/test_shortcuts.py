"""The short ways of a task that does nothing unusual: what they must not be taken for."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import event, select, text
from sqlalchemy.orm import Query, Session, sessionmaker
from support.databases import PostgreSQL, new_sqlite
from support.project.models import Row

from celery_alchemy import Alchemy, BrokenTransaction, LocalStrategy
from celery_alchemy.strategies.engines.held import RecordQueue
from celery_alchemy.strategies.features.read_only import ReadOnlyError
from celery_alchemy.strategies.scope import here


class PlainSessions(LocalStrategy):
    """A strategy of a user's, whose Sessions are SQLAlchemy's own."""

    name = "plain"

    def open(self, unit: Any) -> Session:
        return Session(self.engine, expire_on_commit=False)


Make = Callable[..., Alchemy]


@pytest.fixture(params=["psycopg", "psycopg2"])
def make(request: pytest.FixtureRequest, run_database: PostgreSQL) -> Iterator[Make]:
    made: list[Alchemy] = []

    def make(*, session_factory: Any = None, pool_size: int = 1, **settings: Any) -> Alchemy:
        app = Celery("short", broker="memory://", set_as_current=False)
        options = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": 5}
        app.conf.update(
            alchemy_database_url=run_database.url("short", driver=request.param),
            alchemy_engine_options=options,
            **settings,
        )
        made.append(Alchemy(app, session_factory=session_factory))
        return made[-1]

    yield make
    for db in made:
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        db.dispose()


def swallow_a_raw_error(session: Session) -> None:
    """SQLAlchemy does not see it; the transaction has failed all the same."""
    cursor = session.connection().connection.dbapi_connection.cursor()  # type: ignore[union-attr]
    with contextlib.suppress(Exception):
        cursor.execute("SELECT 1 / 0")


@pytest.mark.parametrize("bind", ["untouched", "asked for its Engine", "detached", "bound anew"])
def test_a_failed_transaction_is_found_however_the_session_got_its_connection(
    make: Make, run_database: PostgreSQL, key: str, bind: str
) -> None:
    db = make(pool_size=2)
    sent: list[str] = []
    with pytest.raises(BrokenTransaction), db.unit_of_work() as session:
        db.on_commit(lambda: sent.append("message"))
        if bind == "asked for its Engine":
            with session.get_bind().connect() as other:  # type: ignore[union-attr]
                other.execute(text("SELECT 1"))
        session.add(Row(key=key))
        session.flush()
        if bind == "detached":
            session.connection().detach()
        elif bind == "bound anew":
            session.bind = db.engine.execution_options(logging_token="x")
        swallow_a_raw_error(session)
    assert (run_database.rows(key), sent) == ([], [])


def test_a_flush_that_failed_without_a_word_of_the_database_is_found(
    make: Make, run_database: PostgreSQL, key: str
) -> None:
    db = make()

    def refuse(mapper: object, connection: object, row: Row) -> None:
        if row.note == "refused":
            raise LookupError

    event.listen(Row, "before_insert", refuse)
    try:
        with pytest.raises(BrokenTransaction), db.unit_of_work() as session:
            session.add(Row(key=key, note="first"))
            session.flush()
            session.add(Row(key=key, note="refused"))
            with contextlib.suppress(LookupError):
                session.flush()
    finally:
        event.remove(Row, "before_insert", refuse)
    assert run_database.rows(key) == []


def test_a_commit_that_was_sent_as_a_statement_leaves_nothing_on_the_connection(
    make: Make, run_database: PostgreSQL, key: str
) -> None:
    db = make()
    with contextlib.suppress(KeyError), db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
        session.execute(text("COMMIT"))
        raise KeyError
    with contextlib.suppress(KeyError), db.unit_of_work() as session:
        session.add(Row(key=key))
        session.flush()
        raise KeyError
    assert run_database.rows(key) == []


def test_who_loses_the_race_for_the_last_place_holds_one_connection(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy's pool begins its checkout again then."""
    db = make()
    taken, done = threading.Event(), threading.Event()
    get, lost = RecordQueue.get, []

    def first() -> None:
        with db.unit_of_work() as session:
            session.execute(text("SELECT 1"))
            taken.set()
            done.wait(0.3)

    winner = threading.Thread(target=first)

    def get_late(queue: RecordQueue, block: bool = True, timeout: float | None = None) -> Any:
        try:
            return get(queue, block, timeout)
        finally:
            if not lost and threading.current_thread() is not winner:
                lost.append(True)
                winner.start()
                assert taken.wait(10)

    monkeypatch.setattr(RecordQueue, "get", get_late)
    for _ in range(2):
        with db.unit_of_work() as session:
            session.execute(text("SELECT 1"))
        assert here().held == []
    winner.join()
    assert lost


@pytest.mark.parametrize("way", ["begin_nested", "begin", "get_transaction"])
@pytest.mark.parametrize("strategy", [f"{__name__}:PlainSessions", "local"])
def test_a_message_of_what_is_rolled_back_is_not_sent(make: Make, key: str, way: str, strategy: str) -> None:
    db = make(alchemy_session_strategy=strategy)
    sent: list[str] = []
    with db.unit_of_work() as session:
        if way != "begin":
            session.add(Row(key=key))
            session.flush()
        transaction = getattr(session, way)()
        db.on_commit(lambda: sent.append("message"))
        transaction.rollback()
    assert sent == []


def test_a_listener_that_is_given_the_transaction_may_end_it(make: Make, run_database: PostgreSQL, key: str) -> None:
    given: list[Any] = []
    factory = sessionmaker()
    event.listen(factory, "after_begin", lambda session, transaction, connection: given.append(transaction))
    db = make(session_factory=factory)
    sent: list[str] = []
    db_unit = db.unit_of_work()
    with db_unit as session:
        db.on_commit(lambda: sent.append("message"))
        session.add(Row(key=key))
        session.flush()
        given[0].rollback()
    assert (run_database.rows(key), sent) == ([], [])


def test_what_streams_is_refused_without_a_transaction(make: Make) -> None:
    db = make()
    with db.unit_of_work(read_only=True) as session:
        with pytest.raises(ReadOnlyError, match="server-side cursor"):
            Query(Row, session).yield_per(1).all()
        with pytest.raises(ReadOnlyError, match="server-side cursor"):
            session.scalars(select(Row).execution_options(yield_per=1))
        session.execute(select(Row.note), execution_options=None)  # type: ignore[call-overload]


def test_a_flush_that_failed_on_one_database_commits_on_none(tmp_path: Path, key: str) -> None:
    """The other one is committed first: what is found out at the second COMMIT is found out too late."""
    with new_sqlite(tmp_path / "a.db") as first, new_sqlite(tmp_path / "b.db") as second:
        app = Celery("two", broker="memory://", set_as_current=False)
        app.conf.alchemy_databases = {"default": first.url(""), "b": second.url("")}
        db = Alchemy(app)

        def refuse(mapper: object, connection: object, row: Row) -> None:
            if row.note == "refused":
                raise LookupError

        event.listen(Row, "before_insert", refuse)
        try:
            with pytest.raises(BrokenTransaction), db.unit_of_work() as session:
                db.databases["b"].session.add(Row(key=key, note="in b"))
                session.add(Row(key=key, note="first"))
                session.flush()
                session.add(Row(key=key, note="refused"))
                with contextlib.suppress(LookupError):
                    session.flush()
        finally:
            event.remove(Row, "before_insert", refuse)
            for one in db.databases.values():
                one.dispose()
        assert (first.rows(key), second.rows(key)) == ([], [])
