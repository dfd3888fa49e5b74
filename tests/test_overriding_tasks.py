"""Task classes that override `apply_async`: what they do happens when the message is sent, and a rollback leaves none.

celery-singleton and celery-once take a lock there.
"""

import asyncio
import logging
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support.shop
from celery import Celery, Task, chain, group
from celery import shared_task as celery_shared_task
from celery_singleton import Singleton
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from support.databases import PostgreSQL
from support.project.models import Row
from support.waiting import eventually
from support.worker import Site

from celery_alchemy import Alchemy, DatabaseTask

with warnings.catch_warnings(action="ignore"):  # of an escape in a docstring, where its installer has not compiled it
    from celery_once import AlreadyQueued, QueueOnce


def once_url(site: Site) -> str:
    """Return the URL of this run's Redis as celery-once reads it."""
    return site.urls.celery.replace("?virtual_host=", "?db=")


class Shop(support.shop.Shop):
    """An app whose tasks take locks in Redis."""

    def __init__(self, path: Path, site: Site, **settings: Any) -> None:
        super().__init__(
            path,
            singleton_backend_url=site.urls.client,
            singleton_key_prefix=f"{site.prefix}singleton",
            ONCE={"backend": "celery_once.backends.Redis", "settings": {"url": once_url(site), "default_timeout": 60}},
            **settings,
        )
        self.redis = site.redis

    def task(self, *bases: type, **options: Any) -> Any:
        """Return a task of these classes; no other has its name, nor its locks."""

        def locked(number: int) -> int:
            return number

        base = type("Locked", bases, {"abstract": True})
        return self.app.task(base=base, shared=False, name=f"locked-{uuid.uuid4().hex}", **options)(locked)

    def is_locked(self, task: Any, number: int = 1) -> bool:
        if isinstance(task, QueueOnce):
            return bool(self.redis.exists(task.get_key((number,))))
        return bool(self.redis.exists(task.generate_lock(task.name, [number])))


@pytest.fixture(params=[False, True], ids=["", "outbox"])
def shop(request: pytest.FixtureRequest, tmp_path: Path, site: Site) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop.db", site, alchemy_enqueue_on_commit=True, alchemy_outbox=request.param)
    yield shop
    shop.close()


BASES = {
    "singleton": (Singleton, DatabaseTask),
    "once": (QueueOnce, DatabaseTask),
    "singleton below": (DatabaseTask, Singleton),
    "once below": (DatabaseTask, QueueOnce),
    "singleton alone": (Singleton,),
    "once alone": (QueueOnce,),
}
Send = Callable[[Shop, Any], Any]
VERBS: dict[str, Send] = {
    "delay": lambda shop, task: task.delay(1),
    "apply_async": lambda shop, task: task.apply_async((1,), countdown=0),
    "signature": lambda shop, task: task.s(1).delay(),
    "chain": lambda shop, task: chain(task.s(1), task.si(2)).delay().parent,
    "db.delay_on_commit": lambda shop, task: shop.db.delay_on_commit(task, 1),
    "delay_on_commit": lambda shop, task: task.delay_on_commit(1),
    "apply_async_on_commit": lambda shop, task: task.apply_async_on_commit((1,), countdown=1),
}


@pytest.fixture(params=BASES)
def bases(request: pytest.FixtureRequest) -> tuple[type, ...]:
    return BASES[request.param]


@pytest.fixture(params=VERBS)
def send(request: pytest.FixtureRequest, bases: tuple[type, ...]) -> Send:
    name: str = request.param
    if name in {"delay_on_commit", "apply_async_on_commit"} and DatabaseTask not in bases:
        pytest.skip("the task has no such method")
    return VERBS[name]


def test_a_rollback_leaves_no_lock(shop: Shop, bases: tuple[type, ...], send: Send) -> None:
    task = shop.task(*bases)
    with pytest.raises(ZeroDivisionError), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        send(shop, task)
        assert not shop.is_locked(task)
        raise ZeroDivisionError
    assert not shop.is_locked(task)
    assert shop.sent() == []


def test_a_commit_locks_and_sends(shop: Shop, bases: tuple[type, ...], send: Send) -> None:
    task = shop.task(*bases)
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        result = send(shop, task)
        assert not shop.is_locked(task)
        assert shop.sent() == []
    assert shop.is_locked(task)
    assert shop.sent() == [result.id]


def test_a_session_of_the_web_application(shop: Shop, bases: tuple[type, ...]) -> None:
    task = shop.task(*bases)
    with Session(shop.engine) as session:
        for end in (session.rollback, session.commit):
            session.add(Row(key="k"))
            result = shop.db.apply_async_on_commit(task, (1,), session=session)
            assert not shop.is_locked(task)
            end()
    assert shop.is_locked(task)
    assert shop.sent() == [result.id]


@pytest.mark.parametrize("kind", ["singleton", "once"])
def test_a_savepoint_that_is_undone_takes_no_lock(shop: Shop, kind: str) -> None:
    task = shop.task(*BASES[kind])
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        with pytest.raises(ZeroDivisionError), session.begin_nested():
            task.delay(1)
            raise ZeroDivisionError
        with session.begin_nested():
            kept = task.delay(2)
    assert (shop.is_locked(task, 1), shop.is_locked(task, 2)) == (False, True)
    assert shop.sent() == [kept.id]


def test_a_duplicate_that_raises_is_an_on_commit_error(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    task = shop.task(*BASES["once"])
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        first, second = task.delay(1), task.delay(1)
        other = task.delay(2)
    assert shop.sent() == [first.id, other.id]
    assert f"on_commit callback sending {task.name}[{second.id}] failed" in caplog.text
    assert "AlreadyQueued" in caplog.text
    with Session(shop.engine) as session:
        assert session.query(Row).count() == 1


def test_it_is_raised_where_that_was_asked_for(shop: Shop) -> None:
    task = shop.task(*BASES["once"])
    with pytest.raises(AlreadyQueued), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        first = task.delay(1)
        task.apply_async_on_commit((1,), raises=True)
    assert shop.sent() == [first.id]
    with Session(shop.engine) as session:
        assert session.query(Row).count() == 1


def test_a_duplicate_that_returns_another_result_is_logged(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    task = shop.task(*BASES["singleton"])
    with caplog.at_level(logging.INFO), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        first, second = task.delay(1), task.delay(1)
    assert shop.sent() == [first.id]
    assert f"sending {task.name}[{second.id}]: it was not sent under this id" in caplog.text
    assert f"returned the result of {first.id}" in caplog.text


class Recording(Task):
    """Says with what it was asked to send, and when."""

    abstract = True
    seen: list[Any]

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        self.seen.append((args, kwargs, options))
        return super().apply_async(args, kwargs, *more, **options)


@pytest.mark.parametrize("bases", [(Recording, DatabaseTask), (Recording,)])
def test_arguments_and_options_are_those_of_the_call(shop: Shop, bases: tuple[type, ...]) -> None:
    seen: list[Any] = []
    task = shop.task(*bases, seen=seen, typing=False)
    changing, headers = ["as it was"], {"tenant": "acme"}
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        task.apply_async((changing,), {"n": 1}, "the-id", headers=headers, priority=3)
        changing.append("changed")
        headers["tenant"] = "other"
        assert seen == []
    ((args, kwargs, options),) = seen
    assert (args, kwargs) == ((["as it was"],), {"n": 1})
    assert options == {"task_id": "the-id", "headers": {"tenant": "acme"}, "priority": 3}
    assert shop.sent() == ["the-id"]


def test_what_cannot_be_sent_fails_at_the_call(shop: Shop) -> None:
    task = shop.task(*BASES["once"])
    with shop.db.unit_of_work():
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            task.delay()
        with pytest.raises(Exception, match="not JSON serializable"):
            task.delay(object())
    assert shop.sent() == []


def test_the_call_may_say_now(shop: Shop) -> None:
    task = shop.task(*BASES["once"])
    with shop.db.unit_of_work():
        result = task.apply_async((1,), enqueue_on_commit=False)
        assert shop.is_locked(task)
        assert shop.sent() == [result.id]


def test_groups_of_them(shop: Shop) -> None:
    task = shop.task(*BASES["singleton"])
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        result = group(task.s(1), task.s(2)).delay()
        assert not shop.is_locked(task)
    assert shop.sent() == [one.id for one in result]


@pytest.mark.parametrize("bases", [(Recording, DatabaseTask), (DatabaseTask, Recording), (Recording,)])
def test_eager_tasks(tmp_path: Path, site: Site, bases: tuple[type, ...]) -> None:
    shop = Shop(tmp_path / "eager.db", site, alchemy_enqueue_on_commit=True, task_always_eager=True)
    seen: list[Any] = []
    task = shop.task(*bases, seen=seen)
    with pytest.raises(ZeroDivisionError), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        task.delay(1)
        raise ZeroDivisionError
    assert seen == []
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        task.delay(1)
        assert seen == []
    assert len(seen) == 1
    shop.close()


@pytest.mark.parametrize("made", ["before", "finalised", "shared", "registered", "proxy"])
def test_however_and_whenever_a_task_is_made(tmp_path: Path, site: Site, made: str) -> None:
    """No DatabaseTask, whose class says so itself; and the app gets its Alchemy before that or after."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    db = Alchemy()
    seen: list[Any] = []
    name = f"made-{uuid.uuid4().hex}"

    def body(number: int) -> None: ...

    def make() -> Any:
        if made == "registered":
            members = {"name": name, "seen": seen, "run": staticmethod(body)}
            return app.register_task(type("Registered", (Recording,), members)())
        if made == "shared":
            return celery_shared_task(base=Recording, name=name, seen=seen)(body)
        return app.task(base=Recording, name=name, seen=seen, shared=False)(body)

    if made in {"before", "proxy"}:
        make()
        if made == "before":
            app.finalize()
    app.conf.update(alchemy_database_url=f"sqlite:///{tmp_path}/shop.db", alchemy_enqueue_on_commit=True)
    db.init_app(app)
    app.finalize()
    if made not in {"before", "proxy"}:
        make()
    task = app.tasks[name]
    with pytest.raises(ZeroDivisionError), db.unit_of_work():
        task.delay(1)
        raise ZeroDivisionError
    assert seen == []
    with db.unit_of_work():
        task.delay(1)
        assert seen == []
    assert len(seen) == 1
    db.stop()
    app.close()


def test_an_agent_that_wraps_send_task_later_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sentry-sdk and others wrap the method of the class, before the app has its Alchemy or after."""
    little = support.shop.Shop(tmp_path / "shop.db")
    seen: list[str] = []
    original = Celery.send_task

    def send_task(app: Celery, name: str, *args: Any, **options: Any) -> Any:
        seen.append(name)
        return original(app, name, *args, **options)

    monkeypatch.setattr(Celery, "send_task", send_task)
    with little.db.unit_of_work():
        little.rename.delay_on_commit("ada")
        assert seen == []
    assert seen == [little.rename.name]
    little.close()


@pytest.mark.parametrize("outbox", [False, True])
def test_on_an_event_loop(run_database: PostgreSQL, tmp_path: Path, site: Site, key: str, outbox: bool) -> None:
    """What it does may take long, and the loop goes on: it is called in a thread."""
    url = run_database.url("overriding")
    little = Shop(tmp_path / "shop.db", site, alchemy_outbox=outbox)
    little.app.conf.alchemy_database_url = url
    seen: list[Any] = []

    class InThread(Task):
        abstract = True

        def apply_async(self, *args: Any, **options: Any) -> Any:
            seen.append(threading.current_thread())
            return super().apply_async(*args, **options)

    task = little.task(InThread, DatabaseTask)

    async def endpoint() -> None:
        engine = create_async_engine(url)
        async with AsyncSession(engine) as session:
            for end in (session.rollback, session.commit):
                session.add(Row(key=key))
                task.apply_async_on_commit((1,), session=session)
                await session.flush()
                await end()
        await engine.dispose()

    asyncio.run(endpoint())
    eventually(little.sent, "it is sent")
    (thread,) = seen
    assert thread is not threading.current_thread()
    little.close()
