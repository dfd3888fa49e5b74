"""What fails after a COMMIT, and what would: listeners, results that cannot be encoded."""

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from kombu.exceptions import EncodeError
from sqlalchemy import create_engine, event, insert, select
from sqlalchemy.orm import Session
from support.databases import PostgreSQL
from support.project.models import Child, Row

from celery_alchemy import Alchemy, DatabaseTask, WorkerPool
from celery_alchemy.strategies.scope import here
from celery_alchemy.workers.errors import UnencodableResult

# -- after the COMMIT, and before it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["after_commit", "after_transaction_end"])
@pytest.mark.parametrize("path", ["the end", "commit()", "begin()"])
def test_a_listener_that_fails_after_the_commit_undoes_nothing(
    db: Alchemy, place: tuple[str, Any], key: str, name: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[str] = []

    def fail(session: Session, transaction: Any = None) -> None:
        if transaction is None or transaction.parent is None:  # each flush has a transaction of its own
            raise ValueError("a listener of the user's")

    with db.unit_of_work() as session:
        event.listen(session, name, fail)
        db.on_commit(lambda: ran.append("callback"))
        if path == "begin()":
            with session.begin():
                session.add(Row(key=key))
        else:
            session.add(Row(key=key))
            if path == "commit()":
                session.commit()
    assert (len(place[1].rows(key)), ran) == (1, ["callback"])
    assert "is committed; after that a listener failed" in caplog.text


def test_a_listener_that_fails_before_the_commit_undoes_all(db: Alchemy, place: tuple[str, Any], key: str) -> None:
    ran: list[str] = []

    def fail(*_: Any) -> None:
        raise ValueError("a listener of the user's")

    with pytest.raises(ValueError, match="of the user's"), db.unit_of_work() as session:
        event.listen(session, "before_commit", fail)
        db.on_commit(lambda: ran.append("callback"))
        session.add(Row(key=key))
    assert (place[1].rows(key), ran) == ([], [])


RESULTS: dict[str, tuple[Callable[[], Any], bool]] = {
    "a model": (lambda: Row(key="x"), False),
    "models in a list": (lambda: [Row(key="x")], False),
    "a model as a key": (lambda: {("a", "b"): 1}, False),
    "a generator": (lambda: (n for n in range(3)), False),
    "an object": (object, False),
    "a lambda": (lambda: print, False),
    "text": (lambda: "text", True),
    "nested": (lambda: {"a": [1, {"b": (None, 2.5)}]}, True),
    "a date": (lambda: __import__("datetime").date(2026, 1, 1), True),
    "a UUID and a Decimal": (lambda: [__import__("uuid").uuid4(), __import__("decimal").Decimal("1.5")], True),
}


class FailsLater(list[int]):
    """Can be gone through once: to encode it before the COMMIT says nothing of the time after."""

    failing = False

    def __iter__(self) -> Any:
        if self.failing:
            raise ValueError("the second time")
        self.failing = True
        return super().__iter__()


RESULTS["a number of 5,000 digits"] = (lambda: 10**5000, False)
RESULTS["such a number in a list"] = (lambda: [10**5000], False)
RESULTS["a large number"] = (lambda: 2**80, True)
RESULTS["what can be encoded once"] = (lambda: FailsLater([1]), False)


def trace_in(worker_pool: str, url: str, key: str, eagerly: str, **task: Any) -> tuple[Any, Any]:
    """Run a task as a worker does; return its result, and the app."""
    app = Celery("results", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.alchemy_database_url = url
    db = Alchemy(app)
    db.start_worker(WorkerPool(name=worker_pool))
    run = task.pop("run")
    registered = app.task(bind=True, name=f"give {key}", **{"base": DatabaseTask, **task})(run)
    app.finalize()
    trace = build_tracer(registered.name, app.tasks[registered.name], app=app)
    request = {"id": key, "task": registered.name, "delivery_info": {}, "reply_to": None, "correlation_id": key}
    trace(key, (), {}, request)
    if eagerly:
        assert app.tasks[registered.name].apply(task_id=f"{key}-eager").state == eagerly  # stored nowhere
    db.stop()
    db.dispose()
    return app.AsyncResult(key), app


@pytest.mark.parametrize("worker_pool", ["solo", "prefork"])
@pytest.mark.parametrize("kind", RESULTS)
def test_what_cannot_be_stored_is_refused_and_nothing_else_is(
    run_database: PostgreSQL, key: str, kind: str, worker_pool: str
) -> None:
    """Celery's own tracer, and its cache backend; Celery itself says what can be stored."""
    make, fits = RESULTS[kind]
    ran: list[int] = []

    def run(self: Any) -> Any:
        self.db.add(Row(key=key if not ran else f"{key}-again"))
        ran.append(1)
        return make()

    shown = "digits" not in kind and "once" not in kind and "such" not in kind
    result, _ = trace_in(worker_pool, run_database.url("lost"), key, "SUCCESS" if shown else "FAILURE", run=run)
    assert len(run_database.rows(f"{key}-again")) == shown
    assert (result.state == "SUCCESS") is fits
    assert len(run_database.rows(key)) == (1 if fits else 0)
    if not fits:
        assert isinstance(result.result, EncodeError | UnencodableResult | Exception)
        assert "returned" in str(result.result)


class Returning(DatabaseTask):
    """Its own `__call__` makes the result."""

    abstract = True
    make: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self).make(super().__call__(*args, **kwargs))


CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str, int]] = {
    "as it is": (lambda: 1, lambda result: result, "SUCCESS", 1),
    "a model, as it is": (lambda: Row(key="x"), lambda result: result, "FAILURE", 0),
    "makes a dict of a model": (lambda: Row(key="x"), lambda result: {"key": result.key}, "SUCCESS", 1),
    "makes a model, after the COMMIT": (lambda: 1, lambda result: Row(key="x"), "SUCCESS", 1),
    "makes a number of 5,000 digits": (lambda: 1, lambda result: 10**5000, "SUCCESS", 1),
}


@pytest.mark.parametrize("worker_pool", ["solo", "prefork"])
@pytest.mark.parametrize("kind", CALLS)
def test_what_an_own_call_returns_fails_no_task_that_has_committed(
    run_database: PostgreSQL, key: str, kind: str, worker_pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    give, make, state, rows = CALLS[kind]
    ran: list[int] = []

    def run(self: Any) -> Any:
        self.db.add(Row(key=key if not ran else f"{key}-again"))
        ran.append(1)
        return give()

    base = type("Own", (Returning,), {"abstract": True, "make": staticmethod(make)})
    result, _ = trace_in(worker_pool, run_database.url("lost"), key, "", run=run, base=base)
    assert (result.state, len(run_database.rows(key))) == (state, rows)
    if "makes a m" in kind or "digits" in kind:
        assert ("None is stored" in caplog.text) is ("dict" not in kind)


def test_a_result_that_nobody_stores_may_be_anything(run_database: PostgreSQL, key: str) -> None:
    app = Celery("results", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = run_database.url("lost")
    db = Alchemy(app)

    @app.task(base=DatabaseTask, bind=True, name=f"give {key}")
    def give(self: Any) -> Any:
        self.db.add(Row(key=key))
        return Child(name="x") if hasattr(Child, "name") else object()

    assert give.apply().state == "SUCCESS"
    assert len(run_database.rows(key)) == 1
    db.dispose()


class Fails:
    """A listener of the user's that fails a few times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, *_: Any) -> None:
        if self.times:
            self.times -= 1
            raise ValueError("a listener of the user's")


@pytest.mark.parametrize("given", [False, True])
def test_a_checkin_listener_that_fails_costs_no_connection_and_no_later_unit(
    db: Alchemy, place: tuple[str, Any], key: str, given: bool
) -> None:
    """More often than there are connections; an Engine of the user's loses its place, that is SQLAlchemy's."""
    if given:
        engine = create_engine(place[0], pool_size=1, max_overflow=20)
        db = Alchemy(Celery("given", broker="memory://", set_as_current=False), engine=engine)
    fail = Fails(12)
    event.listen(db.engine, "checkin", fail)
    for note in range(12):
        with db.unit_of_work() as session:
            session.execute(insert(Row).values(key=key, note=str(note)))
    for ending in (ValueError, ZeroDivisionError, None):
        fail.times = 1
        with contextlib.suppress(ValueError, ZeroDivisionError), db.unit_of_work() as session:
            session.execute(insert(Row).values(key=key, note="dropped"))
            if ending is None:
                session.rollback()
            else:
                raise ending
    assert place[1].rows(key) == [str(note) for note in range(12)]
    assert here().held == []
    if db.engine.dialect.name != "sqlite":  # one transaction at a time
        with db.unit_of_work() as session:
            session.execute(select(1))
            with db.unit_of_work() as inner:
                inner.execute(insert(Row).values(key=key, note="nested"))
        assert place[1].rows(key)[-1] == "nested"
    assert given or db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


@pytest.mark.parametrize("place", ["psycopg", "pymysql"], indirect=True)
def test_who_closes_again_after_a_checkin_that_failed_resets_no_connection_of_another(
    db: Alchemy, place: tuple[str, Any], key: str
) -> None:
    fail = Fails(1)
    event.listen(db.engine, "checkin", fail)
    connection = db.engine.connect()
    with pytest.raises(ValueError, match="of the user's"):
        connection.close()
    with db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="kept"))
        with contextlib.suppress(Exception):
            connection.close()
        del connection
        gc.collect()
    assert place[1].rows(key) == ["kept"]
