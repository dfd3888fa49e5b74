"""The messages that the pages below docs/errors/ are named for come from the causes that the pages give."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from celery import Celery
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from kombu.exceptions import EncodeError
from sqlalchemy import Engine, ForeignKey, NullPool, create_engine, event, exc, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.orm.exc import DetachedInstanceError
from support import preloaded
from support.databases import PostgreSQL
from support.docs import DOCS

from celery_alchemy import Alchemy, NoUnitOfWork

Cause = Callable[[Engine], Any]


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "error_page_users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    friend_id: Mapped[int | None] = mapped_column(ForeignKey("error_page_users.id"))
    friend: Mapped["User"] = relationship()


@pytest.fixture
def engine(run_database: PostgreSQL) -> Iterator[Engine]:
    engine = create_engine(run_database.url("error-pages"), pool_timeout=0.1, connect_args={"prepare_threshold": 0})
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([User(id=1, name="ada"), User(id=2, name="grace")])
        session.commit()
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def keep_sessions_open(engine: Engine) -> None:
    """QueuePool limit of size 5 overflow 10 reached, connection timed out"""
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(Session(engine)).execute(text("SELECT 1"))


def use_it_after_a_failure(engine: Engine) -> None:
    """This Session's transaction has been rolled back due to a previous exception during flush"""
    with Session(engine) as session:
        session.add(User(name="ada"))
        with pytest.raises(exc.IntegrityError):
            session.flush()
        session.scalar(select(User.id))


def lose_the_connection_in_a_transaction(engine: Engine) -> None:
    """Can't reconnect until invalid transaction is rolled back"""
    with Session(engine) as session:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with engine.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 1000)"), {"pid": pid})
        with pytest.raises(exc.OperationalError):
            session.execute(text("SELECT 1"))
        session.execute(text("SELECT 1"))


def give_an_object_to_two_sessions(engine: Engine) -> None:
    """is already attached to session"""
    with Session(engine) as session, Session(engine) as other:
        other.add(session.get_one(User, 1))


def use_an_object_after_its_session(engine: Engine) -> Any:
    """is not bound to a Session; attribute refresh operation cannot proceed"""
    with Session(engine) as session:
        user = session.get_one(User, 1)
        session.commit()
    return user.name


def load_after_the_session(engine: Engine) -> Any:
    """is not bound to a Session; lazy load operation of attribute"""
    with Session(engine) as session:
        user = session.get_one(User, 1)
    return user.friend


def swallow_an_error(engine: Engine) -> None:
    """current transaction is aborted, commands ignored until end of transaction block"""
    with Session(engine) as session:
        with pytest.raises(exc.IntegrityError):
            session.execute(text("INSERT INTO error_page_users (name) VALUES ('ada')"))
        session.execute(text("SELECT 1"))


def change_a_table_under_a_statement(engine: Engine) -> None:
    """cached plan must not change result type"""
    with engine.connect() as connection:
        for _ in range(2):
            connection.execute(text("SELECT * FROM error_page_users"))
        connection.commit()
        with engine.begin() as other:
            other.execute(text("ALTER TABLE error_page_users ADD COLUMN age int"))
        connection.execute(text("SELECT * FROM error_page_users"))


def lock_rows_in_another_order(engine: Engine) -> None:
    """deadlock detected"""
    both = Barrier(2)

    def rename(first: int, second: int) -> None:
        with Session(engine) as session, session.begin():
            session.get_one(User, first, with_for_update=True)
            both.wait(60)
            session.get_one(User, second, with_for_update=True)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(rename, 1, 2), threads.submit(rename, 2, 1)]:
            done.result()


def share_a_session(engine: Engine) -> None:
    """This session is provisioning a new connection; concurrent operations are not permitted"""
    both = Barrier(2)
    with Session(engine) as session, ThreadPoolExecutor(1) as threads:

        def slowly(dbapi_connection: Any, *_: Any) -> None:
            both.wait(60)
            both.wait(60)

        event.listen(engine, "checkout", slowly, once=True)
        first = threads.submit(session.execute, text("SELECT 1"))
        both.wait(60)
        try:
            session.execute(text("SELECT 1"))
        finally:
            both.wait(60)
            first.result()


def two_writers(_: Engine) -> None:
    """database is locked"""
    engine = create_engine("sqlite:///shop.sqlite3", connect_args={"timeout": 0})
    with engine.connect() as connection, engine.connect() as other:
        connection.exec_driver_sql("CREATE TABLE users (name text)")
        connection.exec_driver_sql("INSERT INTO users VALUES ('ada')")
        other.exec_driver_sql("INSERT INTO users VALUES ('grace')")


TWICE = """
import asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
async_engine = create_async_engine({url!r})
async def ask():
    async with async_engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
asyncio.run(ask())
asyncio.run(ask())
"""


def run_twice(engine: Engine) -> None:
    """attached to a different loop"""
    query = {key: value for key, value in engine.url.query.items() if key in {"host", "port"}}
    url = engine.url.set(drivername="postgresql+asyncpg", query=query).render_as_string(hide_password=False)
    command = [sys.executable, "-c", TWICE.format(url=url)]
    done = preloaded.run(command, cwd=Path(__file__).parent, env=os.environ, timeout=250)
    raise RuntimeError(done.stderr)


def use_flasks_session(_: Engine) -> None:
    """Working outside of application context"""
    flask_app = Flask("shop")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    SQLAlchemy(flask_app).session.execute(text("SELECT 1"))


def send_a_model(_: Engine) -> None:
    """Object of type User is not JSON serializable"""
    app = Celery(broker="memory://", set_as_current=False)
    app.send_task("welcome", [User(name="ada")])


def do_two_things_at_once(engine: Engine) -> None:
    """another command is already in progress"""
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.pgconn.send_query(b"SELECT pg_sleep(1)")
        driver.pgconn.send_query(b"ROLLBACK")


def lose_an_idle_connection(engine: Engine) -> None:
    """terminating connection due to administrator command"""
    with engine.connect() as connection:
        pid = connection.scalar(text("SELECT pg_backend_pid()"))
    with create_engine(engine.url, poolclass=NullPool).connect() as other:
        other.execute(text("SELECT pg_terminate_backend(:pid, 1000)"), {"pid": pid})
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))


def read_before_the_commit(engine: Engine) -> None:
    """No row was found when one was required"""
    with Session(engine) as session, Session(engine) as task:
        session.add(User(id=3, name="alan"))
        session.flush()
        task.scalars(select(User).where(User.name == "alan")).one()


def write_what_another_has_written(engine: Engine) -> None:
    """could not serialize access due to concurrent update"""
    strict = engine.execution_options(isolation_level="REPEATABLE READ")
    with Session(strict) as session, Session(strict) as other:
        user = session.get_one(User, 1)
        other.get_one(User, 1).name = "Ada"
        other.commit()
        user.name = "ADA"
        session.flush()


def forget_the_base(_: Engine) -> None:
    """object has no attribute 'db'"""
    app = Celery(broker="memory://", set_as_current=False)

    @app.task(bind=True, shared=False)
    def create(self: Any) -> None:
        self.db.commit()

    create.apply(throw=True)


def use_the_session_nowhere(_: Engine) -> None:
    """where no unit of work is open"""
    Alchemy(Celery(broker="memory://", set_as_current=False)).session.connection()


#: The page of each cause, and the class of what it raises; its docstring is the message.
CAUSES: list[tuple[str, Cause, type[BaseException]]] = [
    ("server-closed-the-connection", lose_an_idle_connection, exc.OperationalError),
    ("no-row-was-found", read_before_the_commit, exc.NoResultFound),
    ("deadlock-detected", write_what_another_has_written, exc.OperationalError),
    ("queuepool-limit", keep_sessions_open, exc.TimeoutError),
    ("pendingrollbackerror", use_it_after_a_failure, exc.PendingRollbackError),
    ("pendingrollbackerror", lose_the_connection_in_a_transaction, exc.PendingRollbackError),
    ("already-attached-to-session", give_an_object_to_two_sessions, exc.InvalidRequestError),
    ("detachedinstanceerror", use_an_object_after_its_session, DetachedInstanceError),
    ("detachedinstanceerror", load_after_the_session, DetachedInstanceError),
    ("current-transaction-is-aborted", swallow_an_error, exc.InternalError),
    ("cached-plan-must-not-change-result-type", change_a_table_under_a_statement, exc.NotSupportedError),
    ("deadlock-detected", lock_rows_in_another_order, exc.OperationalError),
    ("session-used-by-several-threads", share_a_session, exc.InvalidRequestError),
    ("database-is-locked", two_writers, exc.OperationalError),
    ("attached-to-a-different-loop", run_twice, RuntimeError),
    ("working-outside-of-application-context", use_flasks_session, RuntimeError),
    ("not-json-serializable", send_a_model, EncodeError),
    ("has-no-attribute-db", forget_the_base, AttributeError),
    ("no-unit-of-work", use_the_session_nowhere, NoUnitOfWork),
    ("another-command-is-already-in-progress", do_two_things_at_once, Exception),
]


@pytest.mark.parametrize(("page", "cause", "error"), CAUSES, ids=[cause.__name__ for _, cause, _ in CAUSES])
@pytest.mark.usefixtures("in_folder")
def test_the_cause_gives_the_message(page: str, cause: Cause, error: type[BaseException], engine: Engine) -> None:
    with pytest.raises(error) as raised:
        cause(engine)
    assert cause.__doc__ in str(raised.value)
    words = (DOCS / "errors" / f"{page}.md").read_text()
    assert cause.__doc__ in re.sub(r"\s+", " ", words)
