"""Connections whose transactions are followed: what is said of them, what is kept, and who waits."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from support.outbox import Shop
from support.outbox_drivers import shop_of

from celery_alchemy import NotSentYet
from celery_alchemy.strategies.features.foreign_sessions import on_commit_of


@pytest.fixture
def in_memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    with shop_of("psycopg", request, tmp_path, alchemy_outbox=False) as shop:
        yield shop


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name.startswith("celery_alchemy.")]


def send_and_commit(shop: Shop, connection: Connection) -> None:
    with Session(connection) as session:
        shop.note.apply_async_on_commit(("1",), session=session)
        session.commit()


@pytest.mark.parametrize("end", ["rollback", "close", "thrown away", "raises"])
def test_what_waits_in_vain_is_said_where_nothing_else_tells(
    in_memory: Shop, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(in_memory.db.engine.url, poolclass=NullPool)
    with contextlib.suppress(ZeroDivisionError), engine.connect() as connection:
        transaction = connection.begin()
        send_and_commit(in_memory, connection)
        if end == "thrown away":
            del transaction
            connection.invalidate()
        elif end == "raises":
            raise ZeroDivisionError
        else:
            getattr(transaction, end)()
    gc.collect()
    assert in_memory.arguments() == []
    said = warnings(caplog)
    assert len(said) == (end in {"close", "thrown away"})
    assert all("A Connection was closed without a COMMIT" in one for one in said)


def test_nothing_is_kept_of_a_transaction_that_is_over(in_memory: Shop) -> None:
    with in_memory.db.engine.connect() as connection:
        for _ in range(3):
            connection.begin()
            send_and_commit(in_memory, connection)
            connection.commit()
        assert connection.celery_alchemy_followers == {}
    assert len(in_memory.arguments()) == 3


def test_the_result_cannot_be_waited_for(in_memory: Shop) -> None:
    with in_memory.db.engine.begin() as connection, Session(connection) as session:
        result = in_memory.note.apply_async_on_commit(("1",), session=session)
        session.commit()
        with pytest.raises(NotSentYet):
            result.get(timeout=1)
    assert in_memory.arguments() == [["1"]]


def test_a_callback_that_is_registered_while_the_session_reports_its_commit(in_memory: Shop) -> None:
    with in_memory.db.engine.connect() as connection, Session(connection) as session:
        event.listen(
            session, "after_commit", lambda session: in_memory.note.apply_async_on_commit(("1",), session=session)
        )
        for end, sent in (("rollback", []), ("commit", [["1"]])):
            connection.begin()
            session.execute(text("SELECT 1"))
            session.commit()
            assert in_memory.arguments() == []
            getattr(connection, end)()
            assert in_memory.arguments() == sent


def test_its_error_is_raised_to_who_commits(in_memory: Shop) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    connection = in_memory.db.engine.connect()
    with Session(connection) as session:
        connection.begin()
        on_commit_of(session, fails, raises=True)
        session.commit()
    with pytest.raises(ZeroDivisionError):
        connection.commit()
    connection.close()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_async_connection(in_memory: Shop, end: str, caplog: pytest.LogCaptureFixture) -> None:
    async def request() -> None:
        engine = create_async_engine(in_memory.db.engine.url)
        async with engine.connect() as connection:
            transaction = await connection.begin()
            async with AsyncSession(connection) as session:
                with in_memory.db.follow(session):
                    in_memory.note.delay_on_commit("1")
                    await session.commit()
            assert in_memory.arguments() == []
            await getattr(transaction, end)()
        await engine.dispose()

    with caplog.at_level(logging.WARNING):
        asyncio.run(request())
    assert in_memory.arguments() == ([["1"]] if end == "commit" else [])
    assert warnings(caplog) == []
