"""Scripts, web processes, eager tasks: everything that runs without a worker."""

import contextvars
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.orm import Session, sessionmaker
from support.apps import Isolated, make_app
from support.databases import SQLite, new_sqlite
from support.definitions import Refused
from support.project.models import Row, User

from celery_alchemy import Alchemy, CeleryAlchemyError, ConfigurationError, DatabaseTask, NoUnitOfWork
from celery_alchemy.strategies.scope import here
from celery_alchemy.workers.sending.recording import recording


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[SQLite]:
    with new_sqlite(tmp_path / "test.db") as database:
        yield database


@pytest.fixture
def app(sqlite: SQLite) -> Celery:
    app = Isolated("outside", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = sqlite.url("")
    return app


@pytest.fixture
def db(app: Celery) -> Iterator[Alchemy]:
    db = Alchemy(app)
    yield db
    assert db.engine.pool.checkedout() == 0
    db.dispose()


def test_a_unit_of_work_commits_when_its_block_ends(db: Alchemy, sqlite: SQLite, key: str) -> None:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="in a script"))
        assert sqlite.rows(key) == []
        assert db.session.scalars(select(Row.note).where(Row.key == key)).all() == ["in a script"]
    assert sqlite.rows(key) == ["in a script"]


def test_a_unit_of_work_rolls_back_when_its_block_raises(db: Alchemy, sqlite: SQLite, key: str) -> None:
    with pytest.raises(Refused), db.unit_of_work() as session:
        session.add(Row(key=key))
        session.flush()
        raise Refused
    assert sqlite.rows(key) == []


def test_a_swallowed_error_fails_the_block(db: Alchemy, sqlite: SQLite, key: str) -> None:
    """With an error of ours, chained to the one that was swallowed."""
    sqlite.execute("INSERT INTO users (name) VALUES (:key)", key=key)
    with pytest.raises(CeleryAlchemyError, match="rollback") as caught, db.unit_of_work() as session:
        session.add(Row(key=key))
        session.flush()
        try:
            session.add(User(name=key))
            session.flush()
        except IntegrityError as error:
            swallowed = error
    assert caught.value.__cause__ is swallowed
    assert sqlite.rows(key) == []


def test_without_a_unit_of_work_there_is_no_session(db: Alchemy) -> None:
    """NoUnitOfWork is a RuntimeError, and says what to use."""
    with pytest.raises(NoUnitOfWork, match="unit_of_work"):
        db.session.execute(text("SELECT 1"))
    with pytest.raises(RuntimeError, match="unit_of_work"):
        db.session.add(Row())


def test_a_thread_started_in_a_block_has_no_unit_of_work(db: Alchemy) -> None:
    raised: list[BaseException] = []

    def use() -> None:
        try:
            db.session.execute(text("SELECT 1"))
        except NoUnitOfWork as error:
            raised.append(error)

    with db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert len(raised) == 1


def test_on_commit_outside_any_unit_of_work_runs_at_once(db: Alchemy) -> None:
    ran: list[str] = []
    db.on_commit(lambda: ran.append("callback"))
    assert ran == ["callback"]


def test_on_commit_waits_for_the_end_of_the_block(db: Alchemy, sqlite: SQLite, key: str) -> None:
    ran: list[Any] = []
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="row"))
        db.on_commit(lambda: ran.append(sqlite.rows(key)))
        assert ran == []
    assert ran == [["row"]]


def test_an_eager_delay_inside_a_task_has_its_own_unit_of_work(app: Celery, db: Alchemy, key: str) -> None:
    """`task_always_eager`: the outer task's Session is not the inner one's."""
    app.conf.task_always_eager = True
    sessions: list[int] = []

    @app.task(base=DatabaseTask, bind=True)
    def inner(self: Any) -> None:
        self.db.scalars(select(Row)).all()
        sessions.append(id(self.db))

    @app.task(base=DatabaseTask, bind=True)
    def outer(self: Any) -> None:
        self.db.scalars(select(Row)).all()
        sessions.append(id(self.db))
        inner.delay()
        assert self.db.in_transaction()
        sessions.append(id(self.db))

    assert outer.delay().successful()
    first, second, third = sessions
    assert first == third != second


def test_the_constructor_reads_nothing() -> None:
    """Wrong settings are for the worker's start, or for the first use."""
    app = Isolated("outside", broker="memory://", set_as_current=False)
    app.conf.alchemy_sesion_strategy = "local"
    db = Alchemy(app)
    with pytest.raises(ConfigurationError, match="alchemy_session_strategy"):
        _ = db.engine


def test_without_a_url_the_error_is_celerys_too() -> None:
    db = Alchemy(Isolated("outside", broker="memory://", set_as_current=False))
    with pytest.raises(ImproperlyConfigured, match="alchemy_database_url"):
        _ = db.engine
    with pytest.raises(CeleryAlchemyError, match="alchemy_database_url"), db.unit_of_work() as session:
        session.execute(text("SELECT 1"))


def test_init_app_joins_an_app_later(app: Celery, sqlite: SQLite, key: str) -> None:
    db = Alchemy()
    with pytest.raises(ConfigurationError, match="init_app"):
        _ = db.engine
    db.init_app(app)
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="row"))
    assert sqlite.rows(key) == ["row"]
    db.dispose()


def test_an_engine_of_the_users_needs_no_url(sqlite: SQLite, key: str) -> None:
    engine = create_engine(sqlite.url(""))
    db = Alchemy(Isolated("outside", broker="memory://", set_as_current=False), engine=engine)
    assert db.engine is engine
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="row"))
        assert session.get_bind() is engine
    assert sqlite.rows(key) == ["row"]
    db.dispose()


def test_sessions_come_from_the_users_factory(app: Celery, sqlite: SQLite, key: str) -> None:
    class House(Session):
        pass

    db = Alchemy(app, session_factory=sessionmaker(class_=House, info={"from": "factory"}))
    with db.unit_of_work() as session:
        assert isinstance(session, House)
        assert session.info["from"] == "factory"
        session.add(Row(key=key, note="row"))
    assert sqlite.rows(key) == ["row"]
    db.dispose()


def test_session_options_win_over_our_defaults(app: Celery, sqlite: SQLite) -> None:
    app.conf.alchemy_session_options = {"expire_on_commit": True, "autoflush": False}
    db = Alchemy(app)
    with db.unit_of_work() as session:
        assert session.expire_on_commit
        assert not session.autoflush
    db.dispose()


def test_engine_options_win_over_our_defaults(app: Celery) -> None:
    app.conf.alchemy_engine_options = {"pool_size": 7, "max_overflow": 2}
    db = Alchemy(app)
    assert db.engine.pool.size() == 7
    assert db.strategy.max_connections == 9
    db.dispose()


def test_an_attribute_read_after_the_commit_opens_no_transaction(db: Alchemy, key: str) -> None:
    """`expire_on_commit=False`."""
    with db.unit_of_work() as session:
        row = Row(key=key, note="row")
        session.add(row)
        session.commit()
        assert row.note == "row"
        assert not session.in_transaction()
    assert row.note == "row"


def test_a_session_used_after_its_unit_of_work_raises(db: Alchemy) -> None:
    """`close_resets_only=False`: it would check out a connection that nobody gives back."""
    with db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
    with pytest.raises(InvalidRequestError):
        session.execute(text("SELECT 1"))


def test_a_session_kept_from_a_task_raises(app: Celery, db: Alchemy) -> None:
    kept: list[Session] = []

    @app.task(base=DatabaseTask, bind=True)
    def leaky(self: Any) -> None:
        self.db.execute(text("SELECT 1"))
        kept.append(self.db)

    assert leaky.apply().successful()
    with pytest.raises(InvalidRequestError):
        kept[0].execute(text("SELECT 1"))


def test_on_engine_runs_for_an_engine_before_its_first_connection(app: Celery) -> None:
    db = Alchemy(app)
    seen: list[tuple[Any, int]] = []
    db.on_engine(lambda engine: seen.append((engine, engine.pool.checkedin())))
    assert seen == []
    with db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
    assert seen == [(db.engine, 0)]
    db.dispose()


def test_dispose_closes_what_is_idle_and_the_next_statement_connects_anew(db: Alchemy) -> None:
    with db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
    assert db.engine.pool.checkedin() == 1
    db.dispose()
    assert db.engine.pool.checkedin() == 0
    with db.unit_of_work() as session:
        assert session.scalar(text("SELECT 1")) == 1


def test_no_password_in_any_text() -> None:
    """Nor in Celery's own report of the configuration, which masks settings with "database" in their name."""
    secret = "s3cr3t-pa55"
    app, db = make_app(f"postgresql+psycopg://shop:{secret}@127.0.0.1:1/shop")
    app.conf.alchemy_engine_options = {"pool_size": 2}
    with pytest.raises(OperationalError) as caught, db.unit_of_work() as session:
        session.execute(text("SELECT 1"))
    texts = [repr(db), repr(db.strategy), repr(db.engine), repr(db.settings), str(caught.value), app.bugreport()]
    assert secret not in "".join(texts)
    assert "alchemy_database_url" in texts[-1]


@pytest.mark.parametrize("strategy", ["local", "scoped", "per_process"])
def test_a_block_may_be_left_in_another_thread(tmp_path: Path, strategy: str) -> None:
    """As FastAPI runs the two halves of a dependency: in whatever threads of its pool are free."""
    app = Celery("halves", broker="memory://", set_as_current=False)
    app.conf.update(alchemy_database_url=f"sqlite:///{tmp_path}/halves", alchemy_session_strategy=strategy)
    db = Alchemy(app)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        block = db.unit_of_work()
        session = first.submit(block.__enter__).result()
        second.submit(session.execute, text("CREATE TABLE halves (id int)")).result()
        assert first.submit(lambda: db.in_unit_of_work).result()
        assert not second.submit(lambda: db.in_unit_of_work).result()
        second.submit(block.__exit__, None, None, None).result()
        for thread in (first, second):
            assert not thread.submit(lambda: db.in_unit_of_work).result()
            with pytest.raises(NoUnitOfWork):
                thread.submit(db.session).result()
    with db.unit_of_work() as session:
        session.execute(text("SELECT * FROM halves"))
    db.stop()


def test_a_block_that_is_left_open_in_a_thread_is_not_for_other_code(tmp_path: Path) -> None:
    """FastAPI's pool runs each half of a dependency in a context of its own; its thread serves others in between."""
    app = Celery("requests", broker="memory://", set_as_current=False)
    app.conf.update(alchemy_database_url=f"sqlite:///{tmp_path}/requests")
    db = Alchemy(app)

    @app.task(base=DatabaseTask)
    def told(number: int) -> None: ...

    def run(thread: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
        return thread.submit(contextvars.Context().run, function, *args).result()

    def endpoint(session: Session, number: int) -> None:
        assert not db.in_unit_of_work
        with pytest.raises(NoUnitOfWork):
            db.session()
        with db.follow(session):
            told.delay_on_commit(number)
            db.on_commit(functools.partial(ran.append, number))
        with db.unit_of_work():  # of its own
            db.on_commit(functools.partial(ran.append, -number))
        session.execute(text("SELECT 1"))

    def sent() -> list[int]:
        return [message.args[0] for message in enqueued.of(told)]

    ran: list[int] = []
    with recording(app) as enqueued, ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        blocks = [db.unit_of_work() for _ in range(4)]
        sessions = [run(first, block.__enter__) for block in blocks]
        for number, session in enumerate(sessions, 1):
            run(first, endpoint, session, number)
        assert sent() == []
        assert ran == [-1, -2, -3, -4]
        run(first, blocks[0].__exit__, None, None, None)
        error = ZeroDivisionError()
        run(first, blocks[1].__exit__, type(error), error, None)
        run(second, blocks[2].__exit__, None, None, None)
        event.listen(sessions[3], "before_commit", lambda session: told.delay_on_commit(5))
        run(second, blocks[3].__exit__, None, None, None)
        assert sent() == [1, 3, 4, 5]
        assert ran[4:] == [1, 3, 4]
        for thread in (first, second):
            assert run(thread, lambda: here().units) == []
    db.stop()


@pytest.mark.parametrize("ending", ["end", "commit", "read_only"])
def test_a_router_that_writes_has_a_unit_of_work_of_its_own(app: Celery, db: Alchemy, key: str, ending: str) -> None:
    """Not that of the transaction which was waited for: it may be read-only, or be rolled back later."""

    @app.task(base=DatabaseTask)
    def told() -> None: ...

    def router(*args: Any, **options: Any) -> None:
        db.session.add(Row(key=key))

    app.conf.task_routes = (router,)
    with recording_broker(app) as sent:
        with db.unit_of_work(read_only=ending == "read_only") as session:
            session.execute(text("SELECT 1"))
            told.delay_on_commit()
            if ending == "commit":
                session.commit()
                session.rollback()
        assert len(sent) == 1
    with db.unit_of_work(read_only=True) as session:
        assert len(session.scalars(select(Row).where(Row.key == key)).all()) == 1


@contextmanager
def recording_broker(app: Celery) -> Iterator[list[str]]:
    """Yield the ids of what is published."""
    sent: list[str] = []

    publish = app.amqp.send_task_message

    def send(*args: Any, **options: Any) -> Any:
        sent.append(args[2].headers["id"])
        return publish(*args, **options)

    app.amqp.send_task_message = send
    yield sent
    del app.amqp.send_task_message
