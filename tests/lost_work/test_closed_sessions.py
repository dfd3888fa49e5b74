"""A Session that code closes itself, with every driver."""

import contextlib
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import event, insert, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker
from support.project.models import Row
from support.raw import raw_of

from celery_alchemy import Alchemy, DatabaseTask
from celery_alchemy.strategies.errors import SessionClosedEarly

# -- a Session that is closed ------------------------------------------------------------------------------------------


def by_close(session: Session) -> None:
    session.close()


def by_with(session: Session) -> None:
    with session:
        session.flush()


def by_closing(session: Session) -> None:
    with closing(session):
        pass


def by_its_transaction(session: Session) -> None:
    transaction = session.get_transaction()
    assert transaction is not None
    transaction.close()


def by_a_begun_one(session: Session) -> None:
    with contextlib.suppress(InvalidRequestError):  # it has begun
        session.begin()
    with closing(session.get_transaction()):  # type: ignore[type-var]
        session.flush()


CLOSES: dict[str, Callable[[Session], object]] = {
    "close": by_close,
    "with": by_with,
    "contextlib.closing": by_closing,
    "reset": lambda session: session.reset(),
    "invalidate": lambda session: session.invalidate(),
    "by name": Session.close,
    "reset by name": Session.reset,
    "its transaction": by_its_transaction,
    "closing(its transaction)": by_a_begun_one,
    "its transaction, by name": lambda session: Session.get_transaction(session).close(),  # type: ignore[union-attr]
}


def add(session: Session, key: str) -> None:
    session.add(Row(key=key))


def flush(session: Session, key: str) -> None:
    session.add(Row(key=key))
    session.flush()


def core(session: Session, key: str) -> None:
    session.execute(insert(Row).values(key=key, note=""))


def written_as_text(session: Session, key: str) -> None:
    session.execute(text("INSERT INTO rows_ (key_, note) VALUES (:key, '')"), {"key": key})


def by_connection(session: Session, key: str) -> None:
    session.connection().execute(insert(Row).values(key=key, note=""))


def by_raw_cursor(session: Session, key: str) -> None:
    cursor = raw_of(session).cursor()
    cursor.execute(f"INSERT INTO rows_ (key_, note) VALUES ('{key}', '')")
    cursor.close()


WRITES = {function.__name__: function for function in (add, flush, core, written_as_text, by_connection, by_raw_cursor)}


@pytest.mark.parametrize("write", WRITES)
def test_closing_a_session_with_work_in_it_fails_its_unit_of_work(
    db: Alchemy, place: tuple[str, Any], key: str, write: str
) -> None:
    for how in CLOSES.values():
        with (
            pytest.raises(SessionClosedEarly, match=r"closed at \S+closed_sess"),
            db.unit_of_work() as session,
        ):
            WRITES[write](session, key)
            how(session)
    assert place[1].rows(key) == []


def reads(session: Session, key: str) -> None:
    session.execute(text("SELECT 1"))


def reads_and_locks(session: Session, key: str) -> None:
    session.query(Row).filter(Row.key == key).with_for_update().all()


def commits_before(session: Session, key: str) -> None:
    session.add(Row(key=key))
    session.commit()


def nothing(session: Session, key: str) -> None:
    """Not even a transaction."""


def fails_before(session: Session, key: str) -> None:
    """To close a Session whose transaction has failed is to roll it back."""
    with contextlib.suppress(Exception):
        session.execute(text("SELECT * FROM no_such_table"))
    if session.get_bind().dialect.name == "postgresql":
        session.add(Row(key=key))


def close_transaction(session: Session) -> None:
    transaction = session.get_transaction()
    if transaction is not None:
        transaction.close()


@pytest.mark.parametrize("before", [reads, reads_and_locks, commits_before, nothing, fails_before])
def test_a_close_that_loses_nothing_is_allowed(
    db: Alchemy, place: tuple[str, Any], key: str, before: Callable[[Session, str], None]
) -> None:
    for close in (Session.close, by_close, close_transaction):
        with db.unit_of_work() as session:
            before(session, key)
            close(session)
            db.session.add(Row(key=key, note="after"))
        assert place[1].rows(key)[-1:] == ["after"]


def test_what_comes_after_a_close_is_not_committed_alone(db: Alchemy, place: tuple[str, Any], key: str) -> None:
    with pytest.raises(SessionClosedEarly), db.unit_of_work() as session:
        session.add(Row(key=key, note="lost"))
        session.close()
        with contextlib.suppress(SessionClosedEarly):
            db.session.add(Row(key=key, note="half"))
            db.session.commit()
    assert place[1].rows(key) == []


@pytest.mark.parametrize("close", [Session.reset, close_transaction])
@pytest.mark.parametrize("commit", [lambda session: session.commit(), Session.commit])
def test_what_is_written_after_a_close_is_refused_at_once(
    db: Alchemy, place: tuple[str, Any], key: str, close: Callable[[Session], None], commit: Callable[[Session], None]
) -> None:
    """The Session can still be used; it would commit the second half alone."""
    refused: list[str] = []
    with pytest.raises(SessionClosedEarly), db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="lost"))
        close(session)
        for more in (add, core, reads):
            try:
                more(session, key)
                commit(session)
            except SessionClosedEarly as error:
                refused.append(str(error))
                session.rollback()
    assert len(refused) == 3
    assert place[1].rows(key) == []


def begun(session: Session, key: str) -> None:
    transaction = session.begin()
    session.add(Row(key=key))
    transaction.close()


def begun_by_a_listener(session: Session, key: str) -> None:
    transactions: list[SessionTransaction] = []
    event.listen(session, "after_transaction_create", lambda session, transaction: transactions.append(transaction))
    core(session, key)
    transactions[0].close()


@pytest.mark.parametrize("lose", [begun, begun_by_a_listener])
def test_closing_a_transaction_that_was_handed_out_loses_its_work(
    db: Alchemy, place: tuple[str, Any], key: str, lose: Callable[[Session, str], None]
) -> None:
    with pytest.raises(SessionClosedEarly, match=r"closed at \S+closed_sess"), db.unit_of_work() as session:
        lose(session, key)
    assert place[1].rows(key) == []


class OwnSession(Session):
    """A Session class of the user's."""

    def finish(self) -> None:
        super().close()


def test_a_method_of_the_users_session_class_is_no_other_way(place: tuple[str, Any], key: str) -> None:
    app = Celery("lost", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = place[0]
    db = Alchemy(app, session_factory=sessionmaker(class_=OwnSession))
    with pytest.raises(SessionClosedEarly), db.unit_of_work() as session:
        session.add(Row(key=key))
        session.finish()  # type: ignore[attr-defined]
    with db.unit_of_work() as session:
        reads(session, key)
        session.finish()  # type: ignore[attr-defined]
        db.session.add(Row(key=key, note="after"))
    assert place[1].rows(key) == ["after"]
    db.dispose()


@pytest.mark.parametrize("how", CLOSES)
def test_a_shared_scoped_session_a_task_and_its_hooks_lose_nothing_silently(
    place: tuple[str, Any], key: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = Celery("lost", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = place[0]
    db = Alchemy(app)
    shared = scoped_session(sessionmaker())
    db.share(shared)

    @app.task(base=DatabaseTask, bind=True, name=f"lose {key}")
    def lose(self: Any) -> None:
        shared().add(Row(key=key))
        CLOSES[how](shared())

    class Hooked(DatabaseTask):
        name = f"hooked {key}"

        def run(self) -> None:
            """Nothing."""

        def on_success(self, *_: Any) -> None:
            self.db.add(Row(key=key))
            CLOSES[how](self.db)

    assert isinstance(lose.apply().result, SessionClosedEarly)
    hooked = app.register_task(Hooked())
    with contextlib.suppress(SessionClosedEarly):
        assert not hooked.apply().successful() or "SessionClosedEarly" in caplog.text
    assert place[1].rows(key) == []
    db.dispose()


# -- a savepoint -------------------------------------------------------------------------------------------------------


def test_a_savepoint_that_is_closed_loses_what_was_written_in_it(db: Alchemy, place: tuple[str, Any], key: str) -> None:
    with pytest.raises(SessionClosedEarly, match=r"closed at \S+closed_sess"), db.unit_of_work() as session:
        session.add(Row(key=key, note="kept"))
        with closing(session.begin_nested()):  # type: ignore[type-var]
            core(session, key)
    assert place[1].rows(key) == []


@pytest.mark.parametrize("nested", [reads, nothing])
def test_a_savepoint_that_is_closed_without_work_in_it_loses_nothing(
    db: Alchemy, place: tuple[str, Any], key: str, nested: Callable[[Session, str], None]
) -> None:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="kept"))
        savepoint = session.begin_nested()
        nested(session, key)
        savepoint.close()
    assert place[1].rows(key) == ["kept"]


def test_rolling_back_is_a_word(db: Alchemy, place: tuple[str, Any], key: str) -> None:
    """Of the transaction with a savepoint in it, by the Session or by itself, and of a savepoint with another in it."""
    with db.unit_of_work() as session:
        for end in (
            lambda root: root.rollback(),
            lambda root: session.rollback(),
            lambda root: Session.rollback(session),
        ):
            with contextlib.suppress(InvalidRequestError):
                session.begin()
            root = session.get_transaction()
            core(session, key)
            session.begin_nested()
            core(session, key)
            end(root)
            while session.in_transaction():
                session.rollback()
        session.add(Row(key=key, note="kept"))
        outer = session.begin_nested()
        core(session, key)
        session.begin_nested()
        core(session, key)
        outer.rollback()
    assert place[1].rows(key) == ["kept"]


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_what_a_savepoint_has_rolled_back_is_not_lost_by_a_close(db: Alchemy, place: tuple[str, Any], key: str) -> None:
    """Other servers tell by themselves, and know of no writes that were undone."""
    with db.unit_of_work() as session:
        reads(session, key)
        savepoint = session.begin_nested()
        core(session, key)
        savepoint.rollback()
        session.close()


@pytest.mark.parametrize("how", [by_close, by_its_transaction])
def test_a_close_while_a_savepoint_is_open_loses_what_was_written_before_it(
    db: Alchemy, place: tuple[str, Any], key: str, how: Callable[[Session], None]
) -> None:
    with pytest.raises(SessionClosedEarly), db.unit_of_work() as session:
        core(session, key)
        session.begin_nested()
        how(session)
    assert place[1].rows(key) == []


def test_an_exception_is_not_hidden_by_the_close_in_its_finally(db: Alchemy, place: tuple[str, Any], key: str) -> None:
    with pytest.raises(ZeroDivisionError), db.unit_of_work() as session:
        try:
            session.add(Row(key=key))
            raise ZeroDivisionError
        finally:
            session.close()
    assert place[1].rows(key) == []


def test_a_unit_of_work_that_does_not_commit_only_warns(
    db: Alchemy, place: tuple[str, Any], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with db.unit_of_work(commit=False) as session:
        session.add(Row(key=key))
        session.close()
    assert "closed at" in caplog.text
    assert place[1].rows(key) == []
