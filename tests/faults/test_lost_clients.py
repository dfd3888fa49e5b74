"""Who decides how often PostgreSQL looks whether its client is still there."""

from typing import Any

import pytest
from celery import Celery
from sqlalchemy import NullPool, create_engine, text
from support.databases import PostgreSQL

from celery_alchemy import Alchemy, WorkerPool

SHOW = text("SHOW client_connection_check_interval")
OURS = "lost_clients"


def interval(db: Alchemy) -> str:
    db.start_worker(WorkerPool(name="threads", concurrency=2))
    with db.unit_of_work() as session:
        found = str(session.scalar(SHOW))
    db.stop()
    return found


def alchemy(url: str, **engine_options: Any) -> Alchemy:
    app = Celery(OURS, broker="memory://", set_as_current=False)
    app.conf.update(alchemy_database_url=url, alchemy_engine_options=engine_options)
    return Alchemy(app)


@pytest.fixture(params=["psycopg", "psycopg2"])
def url(request: pytest.FixtureRequest, run_database: PostgreSQL) -> str:
    return run_database.url(OURS, driver=request.param)


def test_it_looks_once_a_second(url: str) -> None:
    assert interval(alchemy(url)) == "1s"


def test_what_the_user_says_wins(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "-c client_connection_check_interval=7000"
    assert interval(alchemy(url, connect_args={"options": said})) == "7s"
    assert interval(alchemy(f"{url}&options={said.replace(' ', '%20').replace('=', '%3D')}")) == "7s"
    monkeypatch.setenv("PGOPTIONS", said.replace("7000", "0"))
    assert interval(alchemy(url)) == "0"


def test_what_the_server_says_wins(url: str, run_database: PostgreSQL) -> None:
    name = run_database.engine.url.database
    run_database.execute(f'ALTER DATABASE "{name}" SET client_connection_check_interval = 3000')
    try:
        assert interval(alchemy(url)) == "3s"
    finally:
        run_database.execute(f'ALTER DATABASE "{name}" RESET client_connection_check_interval')


def test_who_connects_for_each_task_and_who_brings_an_engine_are_left_alone(url: str) -> None:
    assert interval(alchemy(url, poolclass=NullPool)) == "0"
    engine = create_engine(url)
    assert interval(Alchemy(Celery(OURS, broker="memory://", set_as_current=False), engine=engine)) == "0"
    engine.dispose()
