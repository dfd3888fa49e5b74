"""Transactions and savepoints of a Connection, ended past its Session: a message is sent if and only if its row is.

Each way adds a row and sends its note at the same place; whatever becomes of one becomes of the other.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.orm import Session
from support.outbox import Shop
from support.outbox_drivers import DRIVERS, shop_of
from support.project.models import Row

from celery_alchemy.workers.sending.outbox import send_waiting

MODES = ["conditional_savepoint", "control_fully", "create_savepoint", "rollback_only"]


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, "relay"], ids=["memory", "outbox"])
def shop(request: pytest.FixtureRequest, driver: str, tmp_path: Path) -> Iterator[Shop]:
    """With the outbox what waits is a row, and is looked for there."""
    with shop_of(driver, request, tmp_path, alchemy_outbox=request.param) as shop:
        yield shop


class Both:
    """Writes rows and sends messages, and finds what has become of them."""

    def __init__(self, shop: Shop, key: str) -> None:
        self.shop, self.key = shop, key

    def __call__(self, session: Session, note: str) -> None:
        session.add(Row(key=self.key, note=note))
        session.flush()
        self.shop.note.apply_async_on_commit((note,), session=session)

    def check_nothing(self) -> None:
        """Fail if anything was sent, or is to be sent by the outbox: nothing is committed yet."""
        assert self.shop.arguments() == []
        assert self.shop.waiting() == []

    def check(self, *notes: str) -> None:
        if self.shop.app.conf.alchemy_outbox:
            send_waiting(self.shop.db)
        assert [argument for (argument,) in self.shop.arguments()] == list(notes)
        assert self.shop.database.rows(self.key) == list(notes)


@pytest.fixture
def both(shop: Shop, key: str) -> Both:
    return Both(shop, key)


# -- a Session on a Connection that other code commits -----------------------------------------------------------------


@contextlib.contextmanager
def on_connection(shop: Shop, mode: str) -> Iterator[tuple[Connection, Session]]:
    with (
        shop.db.engine.connect() as connection,
        Session(connection, join_transaction_mode=mode) as session,
    ):
        yield connection, session


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("begins", ["begin", "statement", "savepoint"])
def test_the_transaction_of_a_connection(shop: Shop, both: Both, mode: str, begins: str, end: str) -> None:
    """`control_fully` lets the Session commit it; all others leave that to the Connection, begun or begun by itself."""
    with on_connection(shop, mode) as (connection, session):
        if begins == "statement":
            connection.execute(text("SELECT 1"))
        else:
            connection.begin()
        if begins == "savepoint":
            connection.begin_nested()
        both(session, "1")
        session.commit()
        if connection.in_transaction():
            both.check_nothing()
            getattr(connection, end)()
        elif end == "rollback":
            end = "commit"
    both.check(*(["1"] if end == "commit" else []))


@pytest.mark.parametrize("mode", MODES)
def test_a_transaction_that_the_session_has_begun(shop: Shop, both: Both, mode: str) -> None:
    """It commits it by itself, though the Connection is not its own."""
    with on_connection(shop, mode) as (connection, session):
        both(session, "1")
        session.commit()
        assert not connection.in_transaction()
        both.check("1")


@pytest.mark.parametrize("mode", MODES)
def test_a_rollback_of_the_session(shop: Shop, both: Both, mode: str) -> None:
    with on_connection(shop, mode) as (connection, session):
        connection.begin()
        both(session, "1")
        session.rollback()
        if connection.in_transaction():
            connection.commit()
    both.check()


@pytest.mark.parametrize("mode", MODES)
def test_a_close_of_the_session(shop: Shop, both: Both, mode: str) -> None:
    """`rollback_only` leaves what was executed to the transaction of the Connection."""
    with on_connection(shop, mode) as (connection, session):
        connection.begin()
        both(session, "1")
        session.close()
        if connection.in_transaction():
            connection.commit()
    both.check(*(["1"] if mode in {"rollback_only", "conditional_savepoint"} else []))


@pytest.mark.parametrize("fails", [False, True])
def test_engine_begin(shop: Shop, both: Both, fails: bool) -> None:
    with (
        contextlib.suppress(ZeroDivisionError),
        shop.db.engine.begin() as connection,
        Session(connection) as first,
        Session(connection) as second,
    ):
        for number, session in enumerate((first, second, first)):
            both(session, str(number))
            session.commit()
        if fails:
            raise ZeroDivisionError
    both.check(*([] if fails else ["0", "1", "2"]))


def test_a_connection_that_goes_on(shop: Shop, both: Both) -> None:
    with shop.db.engine.connect() as connection, Session(connection) as session:
        for number, end in enumerate(["commit", "rollback", "commit"]):
            connection.begin()
            both(session, str(number))
            session.commit()
            getattr(connection, end)()
    both.check("0", "2")


def test_the_savepoint_that_was_open_at_the_commit_of_the_session(shop: Shop, both: Both) -> None:
    with shop.db.engine.begin() as connection:
        for note, end in (("1", "commit"), ("2", "rollback"), ("3", "close"), ("4", "commit")):
            savepoint = connection.begin_nested()
            with Session(connection, join_transaction_mode="create_savepoint") as session:
                both(session, note)
                session.commit()
            getattr(savepoint, end)()
    both.check("1", "4")


def test_a_commit_of_the_connection_before_that_of_the_session(shop: Shop, both: Both) -> None:
    with on_connection(shop, "rollback_only") as (connection, session):
        connection.begin()
        both(session, "1")
        connection.commit()
        both.check("1")


def test_a_message_without_a_statement_waits_too(shop: Shop) -> None:
    if shop.app.conf.alchemy_outbox:
        pytest.skip("the outbox writes a row, which is a statement")
    with shop.db.engine.connect() as connection, Session(connection) as session:
        for end, sent in (("rollback", []), ("commit", [["1"]])):
            connection.begin()
            shop.note.apply_async_on_commit(("1",), session=session)
            session.commit()
            assert shop.arguments() == []
            getattr(connection, end)()
            assert shop.arguments() == sent


def test_a_transaction_in_two_phases(shop: Shop, both: Both, driver: str) -> None:
    if not driver.startswith("psycopg"):
        pytest.skip("PostgreSQL is asked for its prepared transactions")
    with shop.db.engine.connect() as connection, Session(connection) as session:
        for note, end in (("1", "rollback"), ("2", "commit")):
            transaction = connection.begin_twophase()
            both(session, note)
            session.commit()
            getattr(transaction, end)()
    both.check("2")


# -- a Connection of a Session, that its code ends ---------------------------------------------------------------------


@contextlib.contextmanager
def unit(shop: Shop) -> Iterator[Session]:
    with shop.db.unit_of_work() as session:
        yield session


@contextlib.contextmanager
def followed(shop: Shop) -> Iterator[Session]:
    with Session(shop.db.engine) as session, shop.db.follow(session):
        yield session
        session.commit()


OWNERS = pytest.mark.parametrize("owner", [unit, followed])


@OWNERS
def test_the_commit_of_a_connection_sends(shop: Shop, both: Both, owner: Any) -> None:
    with contextlib.suppress(Exception), owner(shop) as session:  # SQLAlchemy refuses to commit a second time
        both(session, "1")
        session.connection().commit()
        both.check("1")


@OWNERS
def test_the_rollback_of_a_connection_drops(shop: Shop, both: Both, owner: Any) -> None:
    with contextlib.suppress(Exception), owner(shop) as session:
        both(session, "1")
        session.connection().rollback()
    both.check()


@OWNERS
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_a_savepoint_of_a_connection(shop: Shop, both: Both, owner: Any, end: str) -> None:
    with owner(shop) as session:
        both(session, "1")
        savepoint = session.connection().begin_nested()
        both(session, "2")
        getattr(savepoint, end)()
        both(session, "3")
    both.check(*(["1", "2", "3"] if end == "commit" else ["1", "3"]))


@OWNERS
def test_savepoints_in_each_other(shop: Shop, both: Both, owner: Any) -> None:
    """Of the Session and of its Connection: what is released in one that is rolled back is undone."""
    with owner(shop) as session:
        connection = session.connection()
        outer = connection.begin_nested()
        both(session, "1")
        with session.begin_nested():
            both(session, "2")
            inner = connection.begin_nested()
            both(session, "3")
            inner.commit()
        outer.rollback()
        both(session, "4")
        outer = connection.begin_nested()
        nested = session.begin_nested()
        session.execute(text("SELECT 1"))  # the savepoint of a Session begins with its first statement
        inner = connection.begin_nested()
        both(session, "5")
        inner.commit()
        nested.rollback()
        both(session, "6")
        outer.commit()
    both.check("4", "6")


def test_a_connection_that_a_listener_is_given(shop: Shop, both: Both) -> None:
    """`after_begin` hands the Connection out, and nothing asks the Session for it."""
    given: list[Connection] = []

    def begun(session: Session, transaction: Any, connection: Connection) -> None:
        given[:] = [connection]

    with shop.db.unit_of_work() as session:
        event.listen(session, "after_begin", begun)
        both(session, "1")
        savepoint = given[0].begin_nested()
        both(session, "2")
        savepoint.rollback()
    both.check("1")


def test_a_callback_of_a_savepoint_is_dropped_alone(shop: Shop) -> None:
    """The same function may wait twice, in the savepoint and outside of it."""
    ran: list[int] = []
    with shop.db.unit_of_work() as session:
        connection = session.connection()
        called: Callable[[], None] = lambda: ran.append(1)  # noqa: E731
        shop.db.on_commit(called)
        savepoint = connection.begin_nested()
        shop.db.on_commit(called)
        savepoint.rollback()
    assert ran == [1]
