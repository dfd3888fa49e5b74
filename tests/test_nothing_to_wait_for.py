"""What is sent "on commit" where there is nothing to wait for, and results that are asked for before the COMMIT."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support.following import ASKED, Send, Web, by_callback, by_delay, said
from support.shop import Shop

from celery_alchemy import CeleryAlchemyError, ConfigurationError, NotSentYet, NoUnitOfWork
from celery_alchemy.strategies.features import following


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop.db")
    yield shop
    shop.close()


@pytest.mark.parametrize("send", ASKED)
def test_it_warns_once_for_each_place(shop: Shop, send: Send, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        send(shop)
    assert len(shop.sent()) == 3
    assert len(said(caplog)) <= 1, "another test may have warned of it"
    for record in said(caplog):
        assert (
            f"{send.__code__.co_filename}:{send.__code__.co_firstlineno + 1} in {send.__name__}" in record.getMessage()
        )
        assert "db.follow(session)" in record.getMessage()


@pytest.mark.parametrize("send", ASKED)
def test_it_may_be_sent_without_a_word(shop: Shop, send: Send, caplog: pytest.LogCaptureFixture) -> None:
    shop.app.conf.alchemy_on_commit_outside = "send"
    send(shop)
    assert len(shop.sent()) == 1
    assert not said(caplog)


@pytest.mark.parametrize("send", ASKED)
def test_it_may_be_refused(shop: Shop, send: Send) -> None:
    shop.app.conf.alchemy_on_commit_outside = "raise"
    with pytest.raises(NoUnitOfWork, match="has no COMMIT to wait for"):
        send(shop)
    assert shop.sent() == []
    with shop.db.unit_of_work():
        send(shop)
    assert len(shop.sent()) == 1
    assert shop.rename.delay("ada").id in shop.sent()


def test_another_value_is_refused(shop: Shop) -> None:
    shop.app.conf.alchemy_on_commit_outside = "ignore"
    with pytest.raises(ConfigurationError, match="'warn', 'send' or 'raise'"):
        by_delay(shop)
    assert shop.sent() == []


def test_an_ended_block_is_followed_no_longer(shop: Shop) -> None:
    """A task of the loop that outlives the request keeps its context."""
    shop.app.conf.alchemy_on_commit_outside = "raise"
    with Session(shop.engine) as session, shop.db.follow(session):
        context = contextvars.copy_context()
    with pytest.raises(NoUnitOfWork):
        context.run(by_delay, shop)


def test_a_shared_session_that_has_none_to_give(shop: Shop) -> None:
    """As Flask-SQLAlchemy's outside an application context."""

    def no_context() -> int:
        raise RuntimeError("Working outside of application context.")

    shop.db.share(scoped_session(sessionmaker(shop.engine), scopefunc=no_context))
    shop.app.conf.alchemy_on_commit_outside = "raise"
    with pytest.raises(NoUnitOfWork):
        by_delay(shop)


def test_a_plain_task_does_not_begin_a_session_of_its_thread(shop: Shop) -> None:
    """The thread goes on after the task with an open Session: the message would wait for another one's COMMIT."""
    sessions = scoped_session(sessionmaker(shop.engine))
    shop.db.share(sessions)
    shop.app.conf.alchemy_on_commit_outside = "raise"

    @shop.app.task(shared=False)
    def plain(commits: bool) -> str:
        if commits:
            sessions.execute(text("SELECT 1"))
        task_id = by_delay(shop)
        if commits:
            assert shop.sent() == []
            sessions.commit()
        return str(task_id)

    with pytest.raises(NoUnitOfWork):
        plain.apply((False,)).get()
    assert [plain.apply((True,)).get()] == shop.sent()
    by_delay(shop)
    assert shop.sent() == [], "a web request may register before its first statement"
    sessions.commit()
    assert len(shop.sent()) == 1
    sessions.remove()


def test_a_block_that_nobody_can_see_is_refused(shop: Shop) -> None:
    """FastAPI runs a sync dependency in a thread, with a copy of the context that is thrown away."""
    session = Session(shop.engine)
    shop.app.conf.alchemy_on_commit_outside = "send"

    def dependency() -> Iterator[Session]:
        with shop.db.follow(session):
            yield session

    generator = dependency()
    contextvars.copy_context().run(next, generator)
    for send in (by_delay, by_callback):
        with pytest.raises(CeleryAlchemyError, match="`async def` dependency"):
            send(shop)
    assert shop.sent() == []
    assert shop.rename.delay("ada").id in shop.sent(), "it waits for nothing"
    with pytest.raises(CeleryAlchemyError, match="`async def` dependency"):
        shop.rename.apply_async(("ada",), enqueue_on_commit=True)
    assert shop.sent() == []
    with pytest.raises(CeleryAlchemyError, match="`async def` dependency"):
        contextvars.copy_context().run(next, generator)
    assert by_delay(shop) in shop.sent()
    session.close()


def test_a_context_that_is_given_up_a_moment_later(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper thread reports the result of a call before it lets the context of it go: who asks then waits for that,
    and no longer."""
    monkeypatch.setattr(following, "SETTLES_S", 3600.0)
    entered, asked = threading.Event(), threading.Event()
    session = Session(shop.engine)

    def dependency() -> Iterator[Session]:
        with shop.db.follow(session):
            yield session

    generator = dependency()

    def helper() -> None:
        context = contextvars.copy_context()
        context.run(next, generator)
        entered.set()
        asked.wait(60)
        del context

    thread = threading.Thread(target=helper)
    thread.start()
    assert entered.wait(60)
    threading.Timer(0.05, asked.set).start()
    with pytest.raises(CeleryAlchemyError, match="`async def` dependency"):
        by_delay(shop)
    thread.join()
    with pytest.raises(CeleryAlchemyError, match="`async def` dependency"):
        contextvars.copy_context().run(next, generator)
    session.close()


def test_nobody_waits_for_a_block_that_is_not_new(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SETTLES_S", 3600.0)
    monkeypatch.setattr(following, "NEW_S", 0.0)
    shop.app.conf.alchemy_on_commit_outside = "send"
    entered, done = threading.Event(), threading.Event()

    def request() -> None:
        with Session(shop.engine) as session, shop.db.follow(session):
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=request)
    thread.start()
    assert entered.wait(60)
    assert by_delay(shop) in shop.sent()
    done.set()
    thread.join()


# -- results -----------------------------------------------------------------------------------------------------------


def waiting_results(shop: Shop) -> Iterator[Callable[[], Any]]:
    from celery import chain, group

    result = shop.rename.delay_on_commit("ada")
    yield result.get
    yield result.wait
    yield lambda: list(result.collect())
    yield shop.app.AsyncResult(result.id).get
    yield shop.rename.AsyncResult(result.id).get
    both = group([shop.rename.si("ada"), shop.rename.si("bob")], app=shop.app).apply_async()
    yield both.get
    yield both.join
    yield both.join_native
    yield lambda: list(both.iter_native())
    yield shop.app.GroupResult("x", [result]).get
    yield chain(shop.rename.si("ada"), shop.rename.si("bob"), app=shop.app).apply_async().get


@pytest.mark.timeout(20)
@pytest.mark.parametrize("place", ["unit of work", "shared", "Session", "AsyncSession"])
def test_to_wait_for_a_result_before_its_commit_is_refused(tmp_path: Path, place: str) -> None:
    shop = Shop(tmp_path / "shop.db", result_backend="cache+memory://", alchemy_enqueue_on_commit=True)
    block = shop.db.unit_of_work() if place == "unit of work" else Web(shop, place)
    with block as session:
        session.execute(text("SELECT 1"))
        for get in waiting_results(shop):
            with pytest.raises(NotSentYet, match="waits for the COMMIT of the transaction that is open here"):
                get()
        other: list[Any] = []
        result = shop.rename.delay_on_commit("ada")

        def get_elsewhere() -> None:
            try:
                result.get(timeout=0.01)
            except Exception as error:
                other.append(error)

        thread = threading.Thread(target=get_elsewhere)
        thread.start()
        thread.join()
        assert type(other[0]).__name__ == "TimeoutError", "another thread may wait for this one's COMMIT"
        session.commit()
        shop.app.backend.store_result(result.id, "done", "SUCCESS")
        assert result.get(timeout=10) == "done"
        dropped = shop.rename.delay_on_commit("ada")
        session.rollback()
        with pytest.raises(Exception, match=r"timed out|TimeoutError"):
            dropped.get(timeout=0.01)
    shop.close()


def test_another_coroutine_may_wait_for_the_result(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop.db", result_backend="cache+memory://")

    async def request() -> None:
        session = Session(shop.engine)
        with shop.db.follow(session):
            result = shop.rename.delay_on_commit("ada")
            with pytest.raises(NotSentYet):
                result.get()

            async def other() -> None:
                with pytest.raises(Exception, match=r"timed out|TimeoutError"):
                    result.get(timeout=0.01)

            await asyncio.create_task(other())
            session.rollback()

    asyncio.run(request())
    shop.close()
