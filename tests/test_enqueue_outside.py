"""Sending after the commit where no worker is: scripts, Sessions of web applications, eager tasks, failing brokers."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu.exceptions import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from support.project.models import Row
from support.shop import Shop

from celery_alchemy import CeleryAlchemyError


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop.db")
    yield shop
    shop.close()


def test_outside_any_unit_of_work_it_is_sent_at_once(shop: Shop) -> None:
    assert shop.sent() == []
    result = shop.rename.delay_on_commit("ada")
    assert shop.sent() == [result.id]


def test_a_unit_of_work_sends_at_its_end(shop: Shop) -> None:
    with shop.db.unit_of_work():
        result = shop.rename.apply_async_on_commit(("ada",), countdown=5)
        assert shop.sent() == []
    assert shop.sent() == [result.id]


def test_a_setting_that_is_wrong_keeps_no_message_back(shop: Shop) -> None:
    """The worker refuses to start with it; a web process that only sends goes on."""
    shop.app.conf.alchemy_commit_on_success = "yes"
    assert shop.rename.delay("ada").id in shop.sent()


def test_a_block_in_a_coroutine_is_refused_and_keeps_no_message_back(shop: Shop) -> None:
    shop.app.conf.alchemy_enqueue_on_commit = True

    async def send() -> list[str]:
        with pytest.raises(CeleryAlchemyError, match=r"async with db\.async_unit_of_work"), shop.db.unit_of_work():
            raise AssertionError
        shop.rename.delay("ada")
        return shop.sent()

    assert len(asyncio.run(send())) == 1


def test_the_setting_waits_inside_a_unit_of_work_only(shop: Shop) -> None:
    shop.app.conf.alchemy_enqueue_on_commit = True
    with shop.db.unit_of_work():
        inside = shop.rename.delay("ada")
        assert shop.sent() == []
    outside = shop.rename.delay("ada")
    assert shop.sent() == [inside.id, outside.id]


@pytest.fixture(params=["Session", "scoped_session"])
def session(request: pytest.FixtureRequest, shop: Shop) -> Iterator[Any]:
    """A Session of somebody else's, which knows nothing of us."""
    factory = sessionmaker(shop.engine)
    found: Any = factory() if request.param == "Session" else scoped_session(factory)
    yield found
    found.close()


def test_a_session_of_the_web_application_is_waited_for(shop: Shop, session: Any) -> None:
    for number in range(2):  # more than once: the Session goes on
        session.add(Row(key=f"k{number}"))
        result = shop.rename.apply_async_on_commit(("ada",), session=session)
        assert shop.sent() == []
        session.commit()
        assert shop.sent() == [result.id]
    session.commit()
    assert shop.sent() == []


@pytest.mark.parametrize("end", ["rollback", "close"])
@pytest.mark.parametrize("wrote", [True, False], ids=["after writing", "before anything"])
def test_what_it_rolls_back_is_dropped(shop: Shop, session: Any, end: str, wrote: bool) -> None:
    if wrote:
        session.add(Row(key="k"))
        session.flush()
    shop.rename.apply_async_on_commit(("ada",), session=session)
    getattr(session, end)()
    session.add(Row(key="other"))
    session.commit()
    assert shop.sent() == []


def test_its_savepoints_are_followed(shop: Shop, session: Any) -> None:
    session.add(Row(key="k"))
    outer = shop.rename.apply_async_on_commit(("outer",), session=session)
    savepoint = session.begin_nested()
    shop.rename.apply_async_on_commit(("undone",), session=session)
    savepoint.rollback()
    with session.begin_nested():
        kept = shop.rename.apply_async_on_commit(("kept",), session=session)
    assert shop.sent() == []
    session.commit()
    assert shop.sent() == [outer.id, kept.id]


def test_an_async_session_is_waited_for(shop: Shop) -> None:
    session = AsyncSession()
    result = shop.rename.apply_async_on_commit(("ada",), session=session)
    assert shop.sent() == []
    session.sync_session.commit()
    assert shop.sent() == [result.id]


def test_a_session_of_a_unit_of_work_may_be_named(shop: Shop) -> None:
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        result = shop.rename.apply_async_on_commit(("ada",), session=session)
        assert shop.sent() == []
    assert shop.sent() == [result.id]


def test_what_is_no_session_is_refused(shop: Shop) -> None:
    with pytest.raises(CeleryAlchemyError, match="session is an int"):
        shop.rename.apply_async_on_commit(("ada",), session=3)


def test_on_commit_takes_a_session_too(shop: Shop) -> None:
    ran = []
    with Session(shop.engine) as session:
        session.add(Row(key="k"))
        shop.db.on_commit(lambda: ran.append(session.in_transaction()), session=session)
        session.commit()
    assert ran == [False]


@pytest.fixture
def broken_broker(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A broker that refuses every message: one in memory cannot be stopped."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OperationalError("no broker here")

    monkeypatch.setattr(shop.app.amqp, "send_task_message", refuse)
    return shop


def test_a_broker_that_fails_after_the_commit_is_logged(broken_broker: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop, ran = broken_broker, []
    with caplog.at_level(logging.ERROR), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        result = shop.rename.delay_on_commit("ada")
        shop.db.on_commit(lambda: ran.append("the other"))
    assert ran == ["the other"]
    assert f"{shop.rename.name}[{result.id}]" in caplog.text
    with Session(shop.engine) as session:
        assert session.query(Row).count() == 1


def test_its_error_is_raised_to_who_commits_where_that_was_asked_for(broken_broker: Shop) -> None:
    shop, ran = broken_broker, []
    with pytest.raises(OperationalError, match="no broker here"), shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        shop.rename.apply_async_on_commit(("ada",), raises=True)
        shop.db.on_commit(lambda: ran.append("the other"))
    assert ran == ["the other"]
    with Session(shop.engine) as session:
        assert session.query(Row).count() == 1


def test_eager_tasks_run_after_the_commit(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "eager.db", task_always_eager=True)
    with shop.db.unit_of_work() as session:
        session.add(Row(key="k"))
        result = shop.rename.delay_on_commit("ada")
        with pytest.raises(TypeError):
            shop.rename.delay_on_commit()
        assert shop.ran == []
    assert shop.ran == ["ada"]
    assert result.id
    assert shop.rename.delay_on_commit("grace").get() is not None
    assert shop.ran == ["ada", "grace"]
    shop.close()
