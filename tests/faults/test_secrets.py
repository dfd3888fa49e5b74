"""A password is never shown, wherever it stands in the configuration, and whatever goes wrong."""

import functools
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import URL, create_engine, make_url, text
from support.databases import PostgreSQL
from support.worker import Start

from celery_alchemy import Alchemy, WorkerPool

SECRET = "s3cr3t/p@ss"
QUOTED = "s3cr3t%2Fp%40ss"
PARTS = ("s3cr3t", "p@ss", "p%40ss")
URL_WITH_IT = f"postgresql+psycopg://shop:{QUOTED}@127.0.0.1:1/shop"

#: Where a password can stand; each with an Engine that can be made.
POSITIONS: dict[str, dict[str, Any]] = {
    "url": {"alchemy_database_url": URL_WITH_IT},
    "url in a query": {"alchemy_database_url": f"postgresql+psycopg://127.0.0.1:1/shop?password={QUOTED}"},
    "URL object": {
        "alchemy_database_url": URL.create(
            "postgresql+psycopg", username="shop", password=SECRET, host="127.0.0.1", port=1
        )
    },
    "connect_args": {"alchemy_engine_options": {"connect_args": {"password": SECRET, "sslpassword": SECRET}}},
    "dsn": {"alchemy_engine_options": {"connect_args": {"options": f"host=there password={SECRET}"}}},
    "url in connect_args": {"alchemy_engine_options": {"connect_args": {"application_name": URL_WITH_IT}}},
    "creator": {"alchemy_engine_options": {"creator": functools.partial(print, SECRET)}},
    "nested": {"alchemy_engine_options": {"execution_options": {"urls": [{"one": URL_WITH_IT}]}}},
    "binds": {"alchemy_session_options": {"binds": {"reports": URL_WITH_IT}}},
    "info": {"alchemy_session_options": {"info": {"url": URL_WITH_IT}}},
}
#: And some that are refused.
REFUSED: dict[str, dict[str, Any]] = {
    "broken url": {"alchemy_database_url": f"postgresql+psycopg://shop:{SECRET}@127.0.0.1:port/shop"},
    "no url": {"alchemy_database_url": f"shop:{SECRET}"},
    "bytes": {"alchemy_database_url": URL_WITH_IT.encode()},
    "list": {"alchemy_database_url": [URL_WITH_IT]},
    "dict": {"alchemy_database_url": {"default": URL_WITH_IT}},
    "async driver": {"alchemy_database_url": URL_WITH_IT.replace("psycopg", "asyncpg")},
    "no such dialect": {"alchemy_database_url": URL_WITH_IT.replace("postgresql+psycopg", "nosuch")},
    "engine option": {"alchemy_engine_options": {"no_such_option": URL_WITH_IT}},
    "engine options": {"alchemy_engine_options": URL_WITH_IT},
    "pool_size": {"alchemy_engine_options": {"pool_size": URL_WITH_IT}},
    "poolclass": {"alchemy_engine_options": {"poolclass": URL_WITH_IT}},
    "key of the options": {"alchemy_engine_options": {7: URL_WITH_IT}},
    "session option": {"alchemy_session_options": {"no_such_option": URL_WITH_IT}},
    "strategy": {"alchemy_session_strategy": f"os:{QUOTED}"},
    "unknown setting": {"alchemy_url": URL_WITH_IT},
}
SHOWN = {"strategy"}  # a value that nobody takes for a secret


def assert_hidden(shown: str) -> None:
    assert [part for part in PARTS if part in shown] == [], shown


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Whatever the library and SQLAlchemy log, from DEBUG on."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(handler.format(record))  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("celery_alchemy", "sqlalchemy")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield said
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def make_app(configuration: dict[str, Any]) -> Celery:
    app = Celery("secrets", broker="memory://", set_as_current=False)
    app.conf.update({"alchemy_database_url": "postgresql+psycopg://127.0.0.1:1/shop", **configuration})
    return app


@pytest.mark.parametrize("position", [*POSITIONS, *REFUSED])
def test_nothing_shows_it(position: str, log: list[str]) -> None:
    app = make_app((POSITIONS | REFUSED)[position])
    db = Alchemy(app)
    shown = [app.bugreport(), json.dumps(app.conf.table(), default=repr), repr(db)]
    for pool in ("threads", "prefork"):
        try:
            strategy = db.start_worker(WorkerPool(name=pool, concurrency=2))
            shown += [repr(strategy), strategy.describe(), repr(db.engine), repr(db.engine.pool), repr(db.settings)]
            with db.unit_of_work() as session:
                shown += [repr(session)]
                session.execute(text("SELECT 1"))
        except Exception as error:
            shown += [str(error), repr(error)]
        shown += [repr(db)]
        db.stop()
    if position not in SHOWN:
        assert_hidden("\n".join([*shown, *log]))


@pytest.mark.parametrize("position", POSITIONS)
def test_the_options_that_work_are_not_changed(position: str) -> None:
    """It is the report that is masked, not the configuration."""
    app = make_app(POSITIONS[position])
    app.bugreport()
    for name, value in POSITIONS[position].items():
        assert app.conf[name] == value


def test_an_engine_of_the_users_own() -> None:
    engine = create_engine(make_url(URL_WITH_IT))
    app = Celery("secrets", broker="memory://", set_as_current=False)
    db = Alchemy(app, engine=engine)
    strategy = db.start_worker(WorkerPool(name="threads", concurrency=2))
    assert_hidden("\n".join([repr(db), repr(strategy), strategy.describe(), repr(db.engine)]))
    db.stop()


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_worker(start: Start, run_database: PostgreSQL, key: str, pool: str) -> None:
    """Its log at DEBUG, its errors, and what it answers to `inspect conf`."""
    url = make_url(run_database.url(f"secret-{key[:8]}")).set(password=SECRET)
    settings = {"alchemy_engine_options": {"connect_args": {"password": SECRET}, "echo": True, "echo_pool": "debug"}}
    with start(
        pool,
        url=url.render_as_string(hide_password=False),
        settings=settings,
        arguments=["-l", "debug"],
        modules=("endings", "transient"),
    ) as worker:
        assert worker.call("write_once", key, "well", 0).state == "SUCCESS"
        failed = worker.call("fail", key)
        assert_hidden(f"{failed.message} {failed.traceback}")
        assert_hidden(json.dumps(worker.inspect("conf")))
        assert_hidden(json.dumps(worker.inspect("conf", with_defaults=True)))
        assert_hidden(worker.log())
