"""The tasks that are compared: each row by hand, and with the layer."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count, repeat
from typing import Any

from celery import Celery
from celery.app.trace import build_tracer
from sqlalchemy import Integer, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from ... import Alchemy, DatabaseTask, completed_tasks_table, outbox_table

BY_HAND, WITH_LAYER = "by hand", "with the layer"
SIDES = (BY_HAND, WITH_LAYER)
#: With the layer too, and what the setting `alchemy_outbox` is then.
OUTBOXES: dict[str, Any] = {"with an outbox": True, "with an outbox, relayed": "relay"}


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "celery_alchemy_overhead"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)


outbox_table(Base.metadata)
completed_tasks_table(Base.metadata)


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison."""

    name: str
    with_layer: str  # The task with the layer, and `by_hand` the one without: keys of `Side.tasks`
    by_hand: str
    ratio: float | None = None  # Target: at most so many of the instructions of the hand-written task
    added: int | None = None  # Target where there is no ratio: at most so many instructions more
    cpu_ratio: float | None = None  # Target for the CPU time, where it is not `ratio`
    added_us: float | None = None


ROWS = (
    Row("no database", "nothing", "nothing", added=20_000, added_us=3.0),
    Row("one SELECT", "select", "select", ratio=1.0),
    Row("one INSERT", "insert", "insert", ratio=1.0),
    Row("ten statements", "ten", "ten", ratio=1.0),
    Row("one SELECT, read_only", "read_only", "select", ratio=0.90, cpu_ratio=0.75),
    Row("one INSERT, delay_on_commit", "on_commit", "on_commit", added=25_000),
    Row("one INSERT, exactly once first", "once_first", "insert"),
    Row("one INSERT, exactly once last", "once_last", "insert"),
    Row("two SELECTs, one in a nested unit", "nested", "select", ratio=2.05),
)
#: Of prefork, whose soft time limits are held back: instead of 1.0.
PREFORK_RATIO = 1.03


@dataclass(slots=True)
class Side:
    """One of the two: its app, with nothing of the other one's, and a call that runs each of its tasks once."""

    app: Celery
    close: Callable[[], object]
    tasks: dict[str, Callable[[], object]]

    def clear_broker(self) -> None:
        """Throw away the messages that were sent."""
        with self.app.connection_for_write() as connection:
            connection.default_channel.queue_purge(self.app.conf.task_default_queue)


#: The strategy of coroutines: under it both sides have `async def` tasks, on an event loop.
AWAITED = "per_loop"


def make_side(side: str, url: str, strategy: str, pool: str = "solo") -> Side:
    """Return a side whose worker is still to be started."""
    if strategy == AWAITED:
        return _awaited(url, pool, ours=side != BY_HAND)
    return _by_hand(url) if side == BY_HAND else _with_layer(url, strategy, OUTBOXES.get(side, False))


def _app(**settings: Any) -> Celery:
    app = Celery("overhead", broker="memory://", set_as_current=False)
    app.conf.update(task_ignore_result=True, worker_hijack_root_logger=False, **settings)
    return app


def _by_hand(url: str) -> Side:
    app = _app()
    engine = create_engine(url, pool_size=1, max_overflow=1)
    task = partial(app.task, shared=False)  # each app has tasks of its own

    @task
    def other() -> None:
        pass

    @task
    def nothing() -> None:
        pass

    @task
    def select() -> None:
        with Session(engine, expire_on_commit=False) as session, session.begin():
            session.execute(text("SELECT 1"))

    @task
    def insert() -> None:
        with Session(engine, expire_on_commit=False) as session, session.begin():
            session.add(Item())

    @task
    def ten() -> None:
        with Session(engine, expire_on_commit=False) as session, session.begin():
            for _ in range(10):
                session.execute(text("SELECT 1"))

    @task
    def on_commit() -> None:
        with Session(engine, expire_on_commit=False) as session, session.begin():
            session.add(Item())
        other.apply_async()

    app.finalize()
    return Side(app, engine.dispose, _runs(app, nothing, select, insert, ten, on_commit))


def _with_layer(url: str, strategy: str, outbox: Any) -> Side:
    app = _app(
        alchemy_database_url=url,
        alchemy_outbox=outbox,
        alchemy_session_strategy=strategy,
        # Not "auto", which takes the slowness of valgrind for that of a network.
        alchemy_begin_with_first_statement=False,
    )
    db = Alchemy(app)
    unbound = partial(app.task, shared=False, base=DatabaseTask)
    task = partial(unbound, bind=True)

    @unbound
    def other() -> None:
        pass

    @unbound
    def nothing() -> None:
        pass

    @task
    def select(self: DatabaseTask) -> None:
        self.db.execute(text("SELECT 1"))

    @task
    def insert(self: DatabaseTask) -> None:
        self.db.add(Item())

    @task
    def ten(self: DatabaseTask) -> None:
        for _ in range(10):
            self.db.execute(text("SELECT 1"))

    @task(read_only=True)
    def read_only(self: DatabaseTask) -> None:
        self.db.execute(text("SELECT 1"))

    @task
    def on_commit(self: DatabaseTask) -> None:
        self.db.add(Item())
        other.delay_on_commit()

    @task
    def select_and_delay(self: DatabaseTask) -> None:
        self.db.execute(text("SELECT 1"))
        other.delay_on_commit()

    @task
    def nested(self: DatabaseTask) -> None:
        self.db.execute(text("SELECT 1"))
        with db.unit_of_work() as session:
            session.execute(text("SELECT 1"))

    app.finalize()
    tasks = (nothing, select, insert, ten, read_only, on_commit, select_and_delay, nested, *_once_tasks(task))
    return Side(app, db.stop, _runs(app, *tasks))


def _once_tasks(task: Callable[..., Any]) -> tuple[Any, Any]:
    @task(exactly_once="first")
    def once_first(self: DatabaseTask) -> None:
        self.db.add(Item())

    @task(exactly_once="last")
    def once_last(self: DatabaseTask) -> None:
        self.db.add(Item())

    return once_first, once_last


def _awaited(url: str, pool: str, *, ours: bool) -> Side:
    from . import awaited

    app = _app()
    if ours:
        app.conf.update(alchemy_database_url=url, alchemy_begin_with_first_statement=False)
    close, tasks = (awaited.with_layer if ours else awaited.by_hand)(app, url)
    app.finalize()
    runs = _runs(app, *tasks)
    if pool == "asyncio":  # elsewhere ours take themselves to an event loop
        runs = {name: awaited.on_loop(task, runs[name], ours) for name, task in zip(runs, tasks, strict=True)}
    return Side(app, close, runs)


def _runs(app: Celery, *tasks: Any) -> dict[str, Callable[[], object]]:
    return {task.name.rpartition(".")[2]: _run_of(app, task) for task in tasks}


def _run_of(app: Celery, task: Any) -> Callable[[], object]:
    """Return a call that runs `task` once through Celery's own tracer."""
    trace = build_tracer(task.name, task, app=app)
    request = {"id": "0", "ignore_result": True, "delivery_info": {}}
    # A task with exactly_once does nothing under an id that is recorded; the others pay for no new one.
    ids = map(f"{uuid.uuid4().hex}-{{}}".format, count()) if getattr(task, "exactly_once", None) else repeat("0")

    def run() -> None:
        task_id = next(ids)
        failed = trace(task_id, (), {}, {**request, "id": task_id}).info
        if failed is not None:
            raise RuntimeError(f"{task.name} failed: {failed!r}")  # Celery has only logged it

    return run
