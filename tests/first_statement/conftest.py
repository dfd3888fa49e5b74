"""An Alchemy that sends BEGIN with the first statement, behind a proxy that counts round trips."""

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import make_url, text
from support import green
from support.apps import make_app
from support.databases import PostgreSQL
from support.first_statement import AWAITED, DRIVERS, SETTING, Coroutines, OnLoop, Started, start_worker

from celery_alchemy import WorkerPool
from celery_alchemy.loadtests.services.proxy import CountingProxy

NAME = f"first-{os.getpid()}"
"""Of the connections: other processes of the same test run look at the same server."""


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def on_loop(driver: str) -> Iterator[OnLoop | None]:
    """What runs the test where it can await; None where that is not needed."""
    if driver != AWAITED:
        yield None
        return
    with contextlib.closing(OnLoop()) as on_loop:
        yield on_loop


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    on_loop = pyfuncitem.funcargs.get("on_loop")
    if on_loop is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    on_loop(lambda: pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def proxy(run_database: PostgreSQL, driver: str) -> Iterator[CountingProxy]:
    with CountingProxy(make_url(green.url_with(run_database, driver.removeprefix("await "), NAME))) as proxy:
        yield proxy


@pytest.fixture
def started(proxy: CountingProxy, run_database: PostgreSQL, on_loop: OnLoop | None) -> Iterator[Started]:
    """Make an Alchemy on the database behind the proxy; afterwards nothing is open."""
    call: Any = on_loop or (lambda function: function())
    with contextlib.ExitStack() as stack:

        def start(mode: object = True, **changes: Any) -> Any:
            _, db = make_app(
                proxy.url.render_as_string(hide_password=False),
                changes={SETTING: mode, **changes},
            )
            db.start_worker(WorkerPool(name="solo"))
            used = db if on_loop is None else Coroutines(db)
            stack.callback(call, used.stop)

            def connect() -> None:
                with used.engine.connect() as connection:  # connecting is not what is counted
                    connection.execute(text("SELECT 1"))

            call(connect)
            return used

        yield start
        assert run_database.busy(NAME) == []


@pytest.fixture
def db(started: Started) -> Any:
    return started()


@pytest.fixture
def start(on_loop: OnLoop | None) -> Started:
    """The same at any URL, with nothing connected."""

    def start(url: str, mode: object, **changes: Any) -> Any:
        db = start_worker(url, mode, **changes)
        return db if on_loop is None else Coroutines(db)

    return start
