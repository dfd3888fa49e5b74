"""What is sent "on commit" outside a unit of work waits for a followed Session, or a shared scoped_session."""

import contextvars
import gc
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from support.following import ASKED, Send, Web, by_delay, said
from support.project.models import Row
from support.shop import Shop

from celery_alchemy import CeleryAlchemyError


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop.db")
    yield shop
    shop.close()


@pytest.fixture(params=["shared", "Session", "AsyncSession"])
def web(request: pytest.FixtureRequest, shop: Shop) -> Web:
    return Web(shop, request.param)


@pytest.mark.parametrize("send", ASKED)
@pytest.mark.parametrize("before", ["nothing", "a statement"])
def test_it_waits_for_the_commit(shop: Shop, web: Web, send: Send, before: str) -> None:
    for _ in range(2):  # the Session goes on
        with web as session:
            if before != "nothing":
                session.execute(text("SELECT 1"))
            task_id = send(shop)
            session.add(Row(key=task_id))
            assert shop.sent() == []
            session.commit()
            assert shop.sent() == [task_id]
            session.execute(text("SELECT 1"))
            session.commit()
            assert shop.sent() == []


@pytest.mark.parametrize("send", ASKED)
@pytest.mark.parametrize("before", ["nothing", "a statement"])
def test_a_rollback_drops_it(shop: Shop, web: Web, send: Send, before: str, caplog: pytest.LogCaptureFixture) -> None:
    with web as session:
        if before != "nothing":
            session.execute(text("SELECT 1"))
        send(shop)
        session.rollback()
        session.add(Row(key="other"))
        session.commit()
    assert shop.sent() == []
    assert not said(caplog)


@pytest.mark.parametrize("send", ASKED)
def test_the_end_without_a_commit_drops_it_with_a_warning(
    shop: Shop, web: Web, send: Send, caplog: pytest.LogCaptureFixture
) -> None:
    with web as session:
        session.add(Row(key="k"))
        send(shop)
    assert shop.sent() == []
    (record,) = said(caplog)
    assert "was closed without a COMMIT" in record.getMessage()
    assert "commit()" in record.getMessage()


@pytest.mark.parametrize("how", ["Session", "AsyncSession"])
def test_the_end_with_an_exception_needs_no_warning(shop: Shop, how: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), Web(shop, how) as session:
        session.add(Row(key="k"))
        by_delay(shop)
        raise ZeroDivisionError
    assert shop.sent() == []
    assert not said(caplog)


def test_a_commit_after_the_block_sends(shop: Shop) -> None:
    with Session(shop.engine) as session:
        with shop.db.follow(session) as followed:
            assert followed is session
            task_id = by_delay(shop)
        assert shop.sent() == []
        session.commit()
    assert shop.sent() == [task_id]


def test_the_owner_may_begin_the_transaction(shop: Shop, web: Web) -> None:
    """It is begun already, so that its end is seen; SQLAlchemy would refuse to begin a second one."""
    for _ in range(2):
        with web as session:
            task_id = by_delay(shop)
            with session.begin():
                session.execute(text("SELECT 1"))
                assert shop.sent() == []
            assert shop.sent() == [task_id]
            with session.begin():
                pass
            with session.begin(), pytest.raises(Exception, match="already begun"):
                session.begin()


def test_a_session_that_does_not_begin_by_itself(shop: Shop) -> None:
    session = Session(shop.engine, autobegin=False)
    with shop.db.follow(session):
        by_delay(shop)
        session.rollback()
        task_id = by_delay(shop)
        with session.begin():
            assert shop.sent() == []
        assert shop.sent() == [task_id]


def test_a_session_that_is_thrown_away_is_warned_of(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with shop.db.follow(Session(shop.engine)):
        by_delay(shop)
    gc.collect()
    assert shop.sent() == []
    assert "was thrown away without a COMMIT" in caplog.text


# -- the setting -------------------------------------------------------------------------------------------------------


def by_plain_delay(shop: Shop) -> Any:
    return shop.rename.delay("ada").id


def by_send_task(shop: Shop) -> Any:
    return shop.app.send_task(shop.rename.name, ("ada",)).id


def by_group(shop: Shop) -> Any:
    from celery import group

    return group([shop.rename.si("ada")], app=shop.app).apply_async().results[0].id


UNASKED = [by_plain_delay, by_send_task, by_group]


@pytest.fixture
def by_setting(shop: Shop) -> None:
    shop.app.conf.alchemy_enqueue_on_commit = True


@pytest.mark.usefixtures("by_setting")
@pytest.mark.parametrize("send", UNASKED)
def test_the_setting_waits_for_what_is_open(shop: Shop, web: Web, send: Send) -> None:
    with web as session:
        early = send(shop)
        assert shop.sent() == [early], "nothing is open yet"
        session.add(Row(key="k"))
        session.flush()
        task_id = send(shop)
        now = shop.rename.apply_async(("ada",), enqueue_on_commit=False).id
        assert shop.sent() == [now]
        session.commit()
        assert shop.sent() == [task_id]
        session.execute(text("SELECT 1"))
        send(shop)
        session.rollback()
        assert shop.sent() == []


@pytest.mark.parametrize("send", [by_plain_delay, by_send_task])
def test_without_the_setting_delay_sends_at_once(shop: Shop, web: Web, send: Send) -> None:
    with web as session:
        session.add(Row(key="k"))
        session.flush()
        assert shop.sent() == []
        assert send(shop) in shop.sent()
        session.rollback()


# -- order, and what is around -----------------------------------------------------------------------------------------


def test_the_order(shop: Shop) -> None:
    """`session=`, a unit of work, a followed Session, the shared one."""
    shared = Web(shop, "shared")
    given, followed = Session(shop.engine), Session(shop.engine)
    with shared as session, shop.db.follow(followed):
        with shop.db.unit_of_work():
            first = shop.rename.apply_async_on_commit(("ada",), session=given).id
            second = by_delay(shop)
        assert shop.sent() == [second]
        third = by_delay(shop)
        session.commit()
        assert shop.sent() == []
        followed.commit()
        assert shop.sent() == [third]
        given.commit()
        assert shop.sent() == [first]
    for one in (given, followed):
        one.close()


def test_blocks_stand_in_each_other(shop: Shop) -> None:
    with Session(shop.engine) as outer, Session(shop.engine) as inner, shop.db.follow(outer):
        with shop.db.follow(inner):
            in_inner = by_delay(shop)
        in_outer = by_delay(shop)
        outer.commit()
        assert shop.sent() == [in_outer]
        inner.commit()
        assert shop.sent() == [in_inner]


def test_a_block_in_a_unit_of_work_is_refused(shop: Shop) -> None:
    with Session(shop.engine) as other, shop.db.unit_of_work() as session:
        with pytest.raises(CeleryAlchemyError, match="inside a unit of work"):
            shop.db.follow(other)
        with shop.db.follow(session):
            by_delay(shop)
            assert shop.sent() == []


def test_what_is_no_session_is_refused(shop: Shop) -> None:
    with pytest.raises(CeleryAlchemyError, match="session is an int"):
        shop.db.follow(3)


def test_a_callback_has_nothing_to_wait_for(shop: Shop, web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """It runs after the COMMIT: what it sends "on commit" would wait for one that nobody intends."""
    with web as session:
        session.add(Row(key="k"))
        shop.db.on_commit(lambda: shop.rename.delay_on_commit("inner"))
        shop.db.on_commit(lambda: shop.db.on_commit(lambda: shop.rename.delay("innermost")))
        session.commit()
        assert len(shop.sent()) == 2
    assert not said(caplog)


def test_a_thread_that_is_given_the_context_sees_the_block(shop: Shop) -> None:
    with Session(shop.engine) as session, shop.db.follow(session):
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(by_delay, shop))
        thread.start()
        thread.join()
        assert shop.sent() == []
        session.commit()
        assert len(shop.sent()) == 1


def test_its_records_are_warnings(shop: Shop, web: Web, caplog: pytest.LogCaptureFixture) -> None:
    with web:
        by_delay(shop)
    assert [record.levelno for record in said(caplog)] == [logging.WARNING]
