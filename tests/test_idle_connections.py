"""A connection that the server closed while it was idle fails no task, and a healthy one is not asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import text
from support.databases import PostgreSQL
from support.waiting import eventually

from celery_alchemy import Alchemy, WorkerPool
from celery_alchemy.strategies.drivers.base import Driver
from celery_alchemy.strategies.engines import held

OURS = "idle_connections"
BACKEND = text("SELECT pg_backend_pid()")


@pytest.fixture(params=["psycopg", "psycopg2"])
def db(request: pytest.FixtureRequest, run_database: PostgreSQL) -> Iterator[Alchemy]:
    app = Celery("idle", broker="memory://", set_as_current=False)
    app.conf.alchemy_database_url = run_database.url(OURS, driver=request.param)
    db = Alchemy(app)
    db.start_worker(WorkerPool(name="threads", concurrency=3))
    yield db
    db.stop()


def backend(db: Alchemy) -> int:
    with db.unit_of_work() as session:
        return int(session.execute(BACKEND).scalar_one())


def terminate(database: PostgreSQL, pid: int) -> None:
    database.execute("SELECT pg_terminate_backend(:pid)", pid=pid)
    eventually(lambda: pid not in [c.pid for c in database.connections(OURS)], "the backend is gone")


def test_an_idle_connection_that_was_terminated_is_replaced(db: Alchemy, run_database: PostgreSQL) -> None:
    first = backend(db)
    assert backend(db) == first, "the connection was to be kept"
    terminate(run_database, first)
    assert backend(db) != first
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_all_idle_connections_may_die_at_once(db: Alchemy, run_database: PostgreSQL) -> None:
    connections = [db.engine.connect() for _ in range(3)]
    for connection in connections:
        connection.execute(BACKEND)
        connection.rollback()
    for connection in connections:
        connection.close()
    for found in run_database.connections(OURS):
        terminate(run_database, found.pid)
    for _ in range(4):
        backend(db)


def test_a_healthy_connection_is_not_pinged(db: Alchemy, monkeypatch: pytest.MonkeyPatch) -> None:
    backend(db)
    pings: list[Any] = []
    monkeypatch.setattr(db.engine.dialect, "do_ping", lambda connection: pings.append(connection) or True)
    for _ in range(5):
        backend(db)
    assert not pings


def test_a_harmless_message_is_no_reason_to_reconnect(db: Alchemy, run_database: PostgreSQL) -> None:
    """A NOTIFY waits on the socket: the connection is asked, answers, and is kept."""
    with db.unit_of_work() as session:
        first = session.execute(BACKEND).scalar_one()
        session.execute(text("LISTEN somebody"))
    run_database.execute("NOTIFY somebody")
    assert backend(db) == first


def test_a_driver_that_shows_no_socket_is_pinged_when_it_was_idle_for_long(
    db: Alchemy, run_database: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mysqlclient is; under load nobody is pinged."""
    monkeypatch.setattr(Driver, "descriptor", lambda self, connection: None)
    pings: list[Any] = []
    ping = db.engine.dialect.do_ping
    monkeypatch.setattr(db.engine.dialect, "do_ping", lambda connection: pings.append(connection) or ping(connection))
    first = backend(db)
    for _ in range(3):
        assert backend(db) == first
    assert not pings
    monkeypatch.setattr(held, "PING_AFTER_S", 0.0)
    assert backend(db) == first
    assert len(pings) == 1
    terminate(run_database, first)
    assert backend(db) != first
    assert len(pings) == 2
