"""The short ways of a task that does nothing unusual: what they must not be taken for."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine, event, inspect, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Query, Session, SessionTransaction, sessionmaker
from support.databases import PostgreSQL, new_sqlite
from support.project.models import Base, Counter, Row

from celery_alchemy import Alchemy, BrokenTransaction, LocalStrategy
from celery_alchemy.strategies._sqlalchemy import SNAPSHOT_MAPS
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
                assert taken.wait(60)

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


@pytest.mark.parametrize("does", ["nothing", "SELECT", "an object"])
def test_a_session_is_closed_for_good_whatever_it_has_done(make: Make, key: str, does: str) -> None:
    db = make()
    row = Row(key=key)
    with db.unit_of_work() as session:
        if does == "SELECT":
            session.execute(text("SELECT 1"))
        elif does == "an object":
            session.add(row)
    assert inspect(row).session is None
    with pytest.raises(InvalidRequestError, match="permanently closed"):
        session.execute(text("SELECT 1"))


def test_a_session_that_is_to_be_reset_only_is(make: Make) -> None:
    db = make(alchemy_session_options={"close_resets_only": True})
    with db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
    assert session.scalar(text("SELECT 1")) == 1
    session.close()


def test_a_session_class_of_the_users_is_told_of_its_close(make: Make) -> None:
    told: list[Session] = []

    class Telling(Session):
        def close(self) -> None:
            told.append(self)
            super().close()

    db = make(session_factory=Telling)
    with db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
        assert session not in told
    assert told[-1] is session


def objects_after(session: Session, savepoint: bool, ends: str) -> list[object]:
    """Change objects in every way, end the transaction or a savepoint in it, and tell what the objects are then."""
    changed, deleted, renamed, new = (
        Counter(key="changed"),
        Counter(key="deleted"),
        Counter(key="was"),
        Counter(key="new"),
    )
    session.add_all([changed, deleted, renamed])
    session.commit()
    transaction = session.begin_nested() if savepoint else session
    changed.value += 1
    renamed.key = "is"
    session.add(new)
    session.delete(deleted)
    session.flush()
    getattr(transaction, ends)()
    found: list[object] = [(session.new, session.dirty, session.deleted)]
    for one in (changed, deleted, renamed, new):
        state = inspect(one)
        found += [state.transient, state.persistent, state.detached, state.expired, state.key, one in session]
    session.commit()
    return [str(part) for part in found] + [
        (row.key, row.value) for row in session.scalars(select(Counter).order_by(Counter.key))
    ]


@pytest.mark.parametrize("ends", ["commit", "rollback"])
@pytest.mark.parametrize("savepoint", [False, True])
def test_objects_are_after_the_end_of_a_transaction_what_they_are_without(savepoint: bool, ends: str) -> None:
    plain = create_engine("sqlite://")
    Base.metadata.create_all(plain)
    with Session(plain, expire_on_commit=False) as session:
        expected = objects_after(session, savepoint, ends)
    app = Celery("objects", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = "sqlite://"
    db = Alchemy(app)
    Base.metadata.create_all(db.engine)
    with db.unit_of_work() as session:
        assert objects_after(session, savepoint, ends) == expected
    db.dispose()


def test_what_a_rollback_is_to_undo_is_noted_where_there_is_something(make: Make, key: str) -> None:
    assert SNAPSHOT_MAPS
    with make().unit_of_work() as session:
        session.execute(text("SELECT 1"))
        transaction = session.get_transaction()
        assert transaction is not None
        assert not vars(transaction).keys() & set(SNAPSHOT_MAPS)
        session.add(Row(key=key))
        session.flush()
        assert vars(transaction).keys() & set(SNAPSHOT_MAPS) == {"_new"}
    with Session(create_engine("sqlite://")) as plain:
        plain.execute(text("SELECT 1"))
        theirs: SessionTransaction | None = plain.get_transaction()
        assert vars(theirs).keys() >= set(SNAPSHOT_MAPS)
