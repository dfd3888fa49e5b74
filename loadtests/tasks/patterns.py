"""The ways to give a task its Session that are compared: ours, what people write by hand, and other frameworks.

A worker builds one of them, which imports what it needs; reading names and summaries imports none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from celery import Celery, Task
from celery.concurrency import get_implementation
from celery.signals import worker_init, worker_process_init
from sqlalchemy import Engine, NullPool, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from . import phases

OURS = "celery-alchemy"
AWAITED = "celery-alchemy-async"
"""Ours too, with `async def` tasks."""
POOLS = ("prefork", "threads", "gevent", "eventlet", "solo")
ASYNCIO = "asyncio"
"""The worker pool of ours; patterns by hand are not made for it."""
DEFAULT_CONNECTIONS = 15  # SQLAlchemy's connection pool: 5 kept open, and 10 more when all are in use
TUNED_CONNECTIONS = 20

AnySession = Session | scoped_session[Any]
Work = Callable[[AnySession], Any]


class Built(NamedTuple):
    """A pattern in a worker: how it runs one attempt of a task, and the class of its tasks."""

    attempt: Callable[[Any, Work], Any]
    """Called with the bound task and the work to do in its Session; returns what the work returns. Where it is
    `async def`, so are the tasks."""
    base: type[Any] = Task
    once: Mapping[str, Any] = {}
    """Options of a task whose effects are to happen once, however often it is delivered; {}: it knows of none."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One way to give a task its Session."""

    name: str
    summary: str  # One sentence for people
    build: Callable[[Celery, str], Built] | None
    """Called once in a worker, with its app and the database URL; None: the worker is another framework's."""
    pools: tuple[str, ...] = POOLS  # The worker pools under which it is what its name says
    connections: Callable[[int], int] = lambda tasks: DEFAULT_CONNECTIONS
    """The most connections of one process that runs so many tasks at one time."""
    worker: tuple[str, ...] = ()
    """Another framework's: the arguments of Python that start its worker, but for how many tasks run at one time."""
    without: tuple[str, ...] = ()  # Names of the workloads that it cannot run

    def runs(self, pool: str, workload: str) -> bool:
        """Whether it is to be compared there."""
        return pool in self.pools and workload not in self.without


PATTERNS: dict[str, Pattern] = {}  # By name, ours first


def pattern_for(pool: str) -> str:
    """Return the pattern of ours that a worker pool is for."""
    return AWAITED if pool == ASYNCIO else OURS


def _pattern(summary: str, name: str = "", **options: Any) -> Callable[[Any], Any]:
    def add(build: Callable[[Celery, str], Built]) -> Callable[[Celery, str], Built]:
        pattern = Pattern(name or build.__name__, summary, build, **options)
        PATTERNS[pattern.name] = pattern
        return build

    return add


def _engine(url: str, **options: Any) -> Engine:
    return phases.instrument(create_engine(url, **options))


def _committed(session: AnySession, work: Work) -> Any:
    result = work(session)
    session.commit()
    return result


def _in_a_block(make_session: Callable[[], Session]) -> Built:
    def attempt(task: Task, work: Work) -> Any:
        with make_session() as session, session.begin():
            return work(session)

    return Built(attempt)


@_pattern("self.db of a DatabaseTask: one Session per task request, committed when the task returns.", OURS)
def celery_alchemy(app: Celery, url: str) -> Built:
    from celery_alchemy import DatabaseTask

    _with_alchemy(app, url)
    return Built(lambda task, work: work(task.db), DatabaseTask, {"exactly_once": True})


def _with_alchemy(app: Celery, url: str) -> None:
    from celery_alchemy import Alchemy

    app.conf.alchemy_database_url = url
    # "auto" would measure a busy machine, and differ from start to start.
    app.conf.alchemy_begin_with_first_statement = False
    Alchemy(app)


#: A plain sleep stops an event loop.
_AWAITS: dict[str, Any] = {"without": ("slow_io",)}


@_pattern(
    "self.db of an AsyncDatabaseTask, an AsyncSession on the event loop of the process.",
    AWAITED,
    pools=(ASYNCIO, "prefork", "threads", "solo"),
    **_AWAITS,
)
def celery_alchemy_async(app: Celery, url: str) -> Built:
    from celery_alchemy import AsyncDatabaseTask

    _with_alchemy(app, url)

    async def attempt(task: Any, work: Work) -> Any:
        return await task.db.run_sync(work)

    return Built(attempt, AsyncDatabaseTask, {"exactly_once": True})


async def _awaited(engine: Any, work: Work) -> Any:
    async with AsyncSession(engine) as session, session.begin():
        return await session.run_sync(work)


@_pattern(
    "asyncio.run(...) with an AsyncSession in each task, on an AsyncEngine that keeps no connection (NullPool).",
    pools=("prefork", "threads", "solo"),
    connections=lambda tasks: 2 * tasks,
    without=("slow_io", "mix"),  # `self.retry()` has to be raised outside of the event loop
)
def asyncio_run(app: Celery, url: str) -> Built:
    """The usual advice for `async def` code in Celery tasks."""
    engine = create_async_engine(url, poolclass=NullPool)
    phases.instrument(engine.sync_engine)
    return Built(lambda task, work: asyncio.run(_awaited(engine, work)))


@_pattern(
    "asyncio.run(...) with an AsyncSession in each task, on an AsyncEngine of that task's own.",
    pools=("prefork", "threads", "solo"),
    connections=lambda tasks: 2 * tasks,
    without=("slow_io", "mix"),  # `self.retry()` has to be raised outside of the event loop
)
def engine_per_task(app: Celery, url: str) -> Built:
    """The other usual advice."""

    async def run(work: Work) -> Any:
        engine = create_async_engine(url)
        phases.instrument(engine.sync_engine)
        try:
            return await _awaited(engine, work)
        finally:
            await engine.dispose()

    return Built(lambda task, work: asyncio.run(run(work)))


@_pattern("The published DatabaseTask: the Session is an attribute of the Task, closed in after_return.")
def recipe(app: Celery, url: str) -> Built:
    """Sources: seatable/dtable-events, dtable_events/celery_app/tasks/base.py; sogo.dev, "Celery and SQLAlchemy"."""
    make_session = sessionmaker(_engine(url))

    class DatabaseTask(Task):  # type: ignore[misc]
        abstract = True
        _session: Session | None = None

        @property
        def session(self) -> Session:
            if self._session is None:
                self._session = make_session()
            return self._session

        def after_return(self, *args: Any, **kwargs: Any) -> None:
            if self._session is not None:
                self._session.close()
                self._session = None

    return Built(lambda task, work: _committed(task.session, work), DatabaseTask)


@_pattern("with Session(engine) in each task, on one Engine made when the module is imported.")
def with_session(app: Celery, url: str) -> Built:
    """Source: SQLAlchemy, "Session Basics"."""
    engine = _engine(url)
    return _in_a_block(lambda: Session(engine))


@_pattern(
    "with Session(engine) in each task, on an Engine that opens a connection for each (NullPool).",
    # The server can still be ending a connection when the next one of the same task slot is there.
    connections=lambda tasks: 2 * tasks,
)
def null_pool(app: Celery, url: str) -> Built:
    """The usual advice against forks."""
    engine = _engine(url, poolclass=NullPool)
    return _in_a_block(lambda: Session(engine))


@_pattern(
    "with Session(engine) in each task, on an Engine made in each pool process by worker_process_init.",
    pools=("prefork", "solo"),
)
def process_init(app: Celery, url: str) -> Built:
    """The other usual advice against forks."""
    make_session = sessionmaker()

    @worker_process_init.connect(weak=False)
    def make_engine(**_: Any) -> None:
        make_session.configure(bind=_engine(url))

    return _in_a_block(make_session)


@_pattern(
    "What an expert writes: a sessionmaker, a connection pool as large as the tasks at one time, made after the fork.",
    connections=lambda tasks: min(tasks, TUNED_CONNECTIONS),
)
def tuned(app: Celery, url: str) -> Built:
    make_session = sessionmaker(_engine(url, poolclass=NullPool), expire_on_commit=False)

    def make_pool(tasks: int) -> None:
        size = min(tasks, TUNED_CONNECTIONS)
        make_session.configure(bind=_engine(url, pool_size=size, max_overflow=0, pool_use_lifo=True))

    @worker_init.connect(weak=False)
    def in_the_only_process(sender: Any, **_: Any) -> None:
        if get_implementation(sender.pool_cls).__module__ != "celery.concurrency.prefork":
            make_pool(sender.concurrency)

    @worker_process_init.connect(weak=False)
    def in_a_pool_process(**_: Any) -> None:
        make_pool(1)

    return _in_a_block(make_session)


@_pattern("A scoped_session with SQLAlchemy's thread-local registry, removed after each task.")
def thread_local(app: Celery, url: str) -> Built:
    session = scoped_session(sessionmaker(_engine(url)))

    def attempt(task: Task, work: Work) -> Any:
        try:
            return _committed(session, work)
        finally:
            session.remove()

    return Built(attempt)


@_pattern("One Session for all tasks of the process.")
def global_session(app: Celery, url: str) -> Built:
    session = Session(_engine(url))

    def attempt(task: Task, work: Work) -> Any:
        try:
            return _committed(session, work)
        except Exception:
            session.rollback()
            raise

    return Built(attempt)


@_pattern("Flask-SQLAlchemy's db.session, in an application context around each task.")
def flask(app: Celery, url: str) -> Built:
    """Sources: Flask, "Background Tasks with Celery"; Flask-SQLAlchemy, "Flask Application Context"."""
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    flask_app = Flask(__name__)
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = url
    db = SQLAlchemy(flask_app)
    with flask_app.app_context():
        phases.instrument(db.engine)

    class FlaskTask(Task):  # type: ignore[misc]
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with flask_app.app_context():
                return self.run(*args, **kwargs)

    return Built(lambda task, work: _committed(db.session, work), FlaskTask)


@_pattern(
    "celery-aio-pool awaits `async def` tasks, one at a time, on an AsyncEngine made when its first task runs.",
    pools=("solo",),  # its peer
    worker=(
        "-c", "import os; os.environ['CELERY_CUSTOM_WORKER_POOL'] = 'celery_aio_pool.pool:AsyncIOPool'; "
        "import celery_aio_pool as pool; pool.patch_celery_tracer(); from celery.__main__ import main; main()",
        "-A", f"{__package__}.app", "worker", "--pool=custom", "--without-gossip", "--without-mingle",
        "--without-heartbeat", "--concurrency",
    ),
)  # fmt: skip
def celery_aio_pool(app: Celery, url: str) -> Built:
    """Source: celery-aio-pool, README."""
    engine = create_async_engine(url)
    phases.instrument(engine.sync_engine)

    async def attempt(task: Any, work: Work) -> Any:
        return await _awaited(engine, work)

    return Built(attempt)


PATTERNS["taskiq"] = Pattern(
    "taskiq",
    "taskiq with an AsyncSession for each task, from a dependency.",
    build=None,
    pools=("gevent",),  # its peer: many tasks at one time in one process
    worker=("-m", "taskiq", "worker", f"{__package__}.taskiq_worker:broker", "--workers=1", "--max-async-tasks"),
    without=("slow_io",),  # a plain sleep stops its event loop
)
