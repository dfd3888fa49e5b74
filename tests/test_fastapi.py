"""`db.follow()` in a FastAPI dependency, as FastAPI runs it: two kinds of dependency, two kinds of endpoint."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from support.databases import PostgreSQL
from support.project.models import Row
from support.shop import Shop

from celery_alchemy import CeleryAlchemyError


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop.db")
    yield shop
    shop.close()


def early(shop: Shop, session: Any, end: str) -> None:
    """What each endpoint begins with: a message before the first statement."""
    assert shop.sent() == []
    shop.rename.delay_on_commit(end)
    assert shop.sent() == []


def sync_endpoint(shop: Shop, dependency: Any) -> Any:
    def endpoint(end: str, session: Any) -> list[str]:
        early(shop, session, end)
        session.execute(insert(Row).values(key=end))
        shop.rename.delay_on_commit(end)
        assert shop.sent() == []
        if end == "fails":
            raise ZeroDivisionError
        if end == "refused":
            raise HTTPException(418)
        getattr(session, end)()
        return shop.sent()

    endpoint.__annotations__["session"] = Annotated[Session, dependency]
    return endpoint


def async_endpoint(shop: Shop, dependency: Any) -> Any:
    sync = sync_endpoint(shop, dependency)

    async def endpoint(end: str, session: Any) -> list[str]:
        sent: list[str] = sync(end, session)
        return sent

    endpoint.__annotations__["session"] = Annotated[Session, dependency]
    return endpoint


def endpoint_with_async_session(shop: Shop, dependency: Any) -> Any:
    async def endpoint(end: str, session: Any) -> list[str]:
        early(shop, session, end)
        await session.execute(insert(Row).values(key=end))
        shop.rename.delay_on_commit(end)
        assert shop.sent() == []
        if end == "fails":
            raise ZeroDivisionError
        if end == "refused":
            raise HTTPException(418)
        await getattr(session, end)()
        return shop.sent()

    endpoint.__annotations__["session"] = Annotated[AsyncSession, dependency]
    return endpoint


class Dependencies:
    """Ways to give an endpoint its Session, and to follow that."""

    def __init__(self, shop: Shop, url: str) -> None:
        self.shop, self.url = shop, url

    async def in_one(self) -> AsyncIterator[Session]:
        with Session(self.shop.engine) as session, self.shop.db.follow(session):
            yield session

    def plain(self) -> Iterator[Session]:
        with Session(self.shop.engine) as session:
            yield session

    @property
    def on_top(self) -> Any:
        """An `async def` dependency over a `def` one."""

        async def follow(session: Any) -> AsyncIterator[Session]:
            with self.shop.db.follow(session):
                yield session

        follow.__annotations__["session"] = Annotated[Session, Depends(self.plain)]
        return follow

    async def asynchronous(self) -> AsyncIterator[AsyncSession]:
        engine = create_async_engine(self.url)
        try:
            async with AsyncSession(engine) as session:
                with self.shop.db.follow(session):
                    yield session
        finally:
            await engine.dispose()

    def unseen(self) -> Iterator[Session]:
        with Session(self.shop.engine) as session, self.shop.db.follow(session):
            yield session


WAYS = [
    ("in_one", sync_endpoint),
    ("in_one", async_endpoint),
    ("on_top", sync_endpoint),
    ("on_top", async_endpoint),
    ("asynchronous", endpoint_with_async_session),
]


@pytest.mark.parametrize("scope", ["request", "function"])
@pytest.mark.parametrize(("how", "make"), WAYS)
def test_messages_wait_for_the_commit_of_the_request(
    shop: Shop, run_database: PostgreSQL, how: str, make: Any, scope: Any, caplog: pytest.LogCaptureFixture
) -> None:
    api = FastAPI()
    found = getattr(Dependencies(shop, run_database.url("fastapi")), how)
    api.post("/{end}")(make(shop, Depends(found, scope=scope)))
    with TestClient(api, raise_server_exceptions=False) as client, caplog.at_level(logging.WARNING, "celery_alchemy"):
        for _ in range(3):
            assert len(client.post("/commit").json()) == 2
            for end, code in (("rollback", 200), ("fails", 500), ("refused", 418)):
                assert client.post(f"/{end}").status_code == code
                assert shop.sent() == []
        assert not [one for one in caplog.records if one.name.startswith("celery_alchemy")]
        assert client.post("/flush").json() == []
    assert shop.sent() == []
    assert "was closed without a COMMIT" in caplog.text


def test_one_dependency_for_the_whole_application(shop: Shop) -> None:
    """The Session of the endpoint is the one that is followed: FastAPI makes it once for each request."""
    ways = Dependencies(shop, "")
    api = FastAPI(dependencies=[Depends(ways.on_top)])
    api.post("/{end}")(sync_endpoint(shop, Depends(ways.plain)))
    with TestClient(api) as client:
        assert len(client.post("/commit").json()) == 2
        assert client.post("/rollback").json() == []


@pytest.mark.parametrize("make", [sync_endpoint, async_endpoint])
def test_a_sync_dependency_that_follows_is_refused(shop: Shop, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its context is a copy that no endpoint sees. Nothing is sent at once without a word."""
    api = FastAPI()
    api.post("/{end}")(make(shop, Depends(Dependencies(shop, "").unseen)))
    with TestClient(api) as client:
        for _ in range(20):
            with pytest.raises(CeleryAlchemyError, match="Enter the block in an `async def` dependency"):
                client.post("/commit")
    assert shop.sent() == []


def test_requests_at_the_same_time_do_not_mix(shop: Shop, run_database: PostgreSQL) -> None:
    api = FastAPI()
    inside = 0
    both = asyncio.Event()

    async def endpoint(end: str, session: Any) -> str:
        nonlocal inside
        inside += 1
        if inside == 2:
            both.set()
        await both.wait()
        task_id: str = shop.rename.delay_on_commit(end).id
        await asyncio.sleep(0)
        await getattr(session, end)()
        return task_id

    found = Dependencies(shop, run_database.url("fastapi")).asynchronous
    endpoint.__annotations__["session"] = Annotated[AsyncSession, Depends(found)]
    api.post("/{end}")(endpoint)

    async def ask() -> list[str]:
        import httpx2

        transport = httpx2.ASGITransport(api)
        async with httpx2.AsyncClient(transport=transport, base_url="http://shop") as client:
            answers = await asyncio.gather(client.post("/commit"), client.post("/rollback"))
        return [answer.json() for answer in answers]

    committed, _ = asyncio.run(ask())
    assert shop.sent() == [committed]


def test_a_background_task_is_after_the_request(shop: Shop, run_database: PostgreSQL) -> None:
    """Its Session is closed, or about to be: there is nothing to wait for, and no message is lost."""
    api = FastAPI()

    async def endpoint(session: Any, background: BackgroundTasks) -> None:
        await session.execute(insert(Row).values(key="k"))
        background.add_task(shop.rename.delay_on_commit, "later")
        await session.commit()

    found = Dependencies(shop, run_database.url("fastapi")).asynchronous
    endpoint.__annotations__["session"] = Annotated[AsyncSession, Depends(found, scope="function")]
    api.post("/")(endpoint)
    with TestClient(api) as client:
        assert client.post("/").status_code == 200
    assert len(shop.sent()) == 1
