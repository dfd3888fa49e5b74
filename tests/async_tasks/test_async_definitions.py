"""How `async def` tasks are defined, and what of the user's they can and cannot use."""

from collections.abc import Callable
from typing import Annotated, Any

import pytest
from celery import Celery
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from support.async_shop import Shop
from support.databases import PostgreSQL
from support.project.models import Row

from celery_alchemy import (
    Alchemy,
    AsyncDatabaseTask,
    ConfigurationError,
    CurrentAsyncSession,
    CurrentSession,
    DatabaseTask,
    UseDatabase,
)

Start = Callable[..., Any]


def test_db_task_makes_an_async_task_of_an_async_function(shop: Shop, run_database: PostgreSQL, key: str) -> None:
    @shop.db.task(name=f"bound-{key}", shared=False)
    async def bound(self: AsyncDatabaseTask, session: CurrentAsyncSession, note: str) -> str:
        assert session is self.db
        session.add(Row(key=key, note=note))
        return note

    @shop.db.task(shared=False)
    async def plain(session: CurrentAsyncSession) -> int:
        return len((await session.scalars(select(Row).where(Row.key == key))).all())

    class House(AsyncDatabaseTask):
        abstract = True

    @shop.db.task(base=House, shared=False, name=f"house-{key}")
    async def of_a_class_below(self: Any) -> str:
        return type(self).__mro__[1].__name__

    @shop.db.task(base=DatabaseTask, shared=False, name=f"wrong-{key}")
    async def wrong() -> None: ...

    assert bound.apply(("ada",), throw=True).result == "ada"
    assert run_database.rows(key) == ["ada"]
    assert plain.apply(throw=True).result == 1
    assert of_a_class_below.apply(throw=True).result == "House"
    with pytest.raises(ConfigurationError, match="base=AsyncDatabaseTask"):
        _ = wrong.name
    with pytest.raises(TypeError):
        bound.apply_async(("ada", "lovelace"))


def test_the_other_kind_of_function_is_refused_where_it_is_defined(shop: Shop) -> None:
    async def coroutine(task: Any) -> None: ...

    def ordinary(task: Any) -> None: ...

    for body, base, other in (
        (coroutine, DatabaseTask, "AsyncDatabaseTask"),
        (ordinary, AsyncDatabaseTask, "Database"),
    ):
        task = shop.task(body, base=base)
        with pytest.raises(ConfigurationError, match=f"base={other}"):
            _ = task.name


async def with_session(session: CurrentSession | None) -> None: ...


async def with_other_database(session: "Annotated[Session, UseDatabase('reports')]") -> None: ...


def with_async_session(session: CurrentAsyncSession) -> None: ...


def with_other_async(*, other: "Annotated[AsyncSession, UseDatabase('reports')]") -> None: ...


@pytest.mark.parametrize(
    ("function", "base", "named"),
    [
        (with_session, AsyncDatabaseTask, ("CurrentAsyncSession", "base=DatabaseTask")),
        (with_other_database, AsyncDatabaseTask, ("AsyncSession", "base=DatabaseTask")),
        (with_async_session, DatabaseTask, ("CurrentSession", "base=AsyncDatabaseTask")),
        (with_other_async, DatabaseTask, ("CurrentSession", "base=AsyncDatabaseTask")),
    ],
)
def test_the_session_of_the_other_kind_is_refused_where_a_task_is_defined(
    function: Any, base: Any, named: tuple[str, ...]
) -> None:
    app = Celery("kinds", broker="memory://", set_as_current=False)
    app.task(base=base, name="wrong", shared=False)(function)
    with pytest.raises(ConfigurationError) as refused:
        app.finalize()
    assert all(name in str(refused.value) for name in ("wrong", *named)), refused.value


def test_a_session_for_type_checkers_alone_is_refused_in_both_spellings() -> None:
    """It would not be passed."""

    async def body(session: "Unknown[CurrentAsyncSession]") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    app = Celery("kinds", broker="memory://", set_as_current=False)
    app.task(base=AsyncDatabaseTask, name="wrong", shared=False)(body)
    with pytest.raises(ConfigurationError, match="cannot be evaluated"):
        app.finalize()


async def one(task: Any) -> Any:
    return task.db.sync_session.autoflush, await task.db.scalar(text("SELECT 1"))


@pytest.mark.parametrize(
    ("brought", "remedy"),
    [
        ("engine", r"got .*AsyncEngine.*AsyncEngine for each event loop.*alchemy_database_url.*on_engine"),
        ("engine inside", r"inside an AsyncEngine.*alchemy_database_url.*on_engine"),
        ("maker", r"session_factory makes AsyncSessions.*Give a sessionmaker"),
        ("class", r"session_factory makes AsyncSessions.*Give a sessionmaker"),
        ("reset", r"alchemy_reset_on_return=True.*(psycopg|asyncpg).*Leave it out"),
    ],
)
def test_what_the_user_brings_and_coroutines_cannot_use_is_refused_with_the_remedy(
    shop: Shop, brought: str, remedy: str
) -> None:
    class Own(AsyncSession):
        pass

    url = shop.app.conf.alchemy_database_url
    engine = create_async_engine(url)
    options: dict[str, Any] = {
        "engine": {"engine": engine},
        "engine inside": {"engine": engine.sync_engine},
        "maker": {"session_factory": async_sessionmaker()},
        "class": {"session_factory": Own},
        "reset": {},
    }[brought]
    app = Celery("brings", broker="memory://", set_as_current=False)
    app.conf.alchemy_reset_on_return = brought == "reset"
    if "engine" not in options:
        app.conf.alchemy_database_url = url
    Alchemy(app, **options)
    with pytest.raises(ConfigurationError, match=remedy):
        app.task(base=AsyncDatabaseTask, bind=True, shared=False, name="one")(one).apply(throw=True)


@pytest.mark.parametrize("how", ["setting", "factory"])
def test_session_options_are_those_of_coroutines_too(shop: Shop, how: str) -> None:
    options: dict[str, Any] = {"session_factory": sessionmaker(autoflush=False)} if how == "factory" else {}
    app = Celery("options", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.alchemy_database_url = shop.app.conf.alchemy_database_url
    if how == "setting":
        app.conf.alchemy_session_options = {"autoflush": False}
    db = Alchemy(app, **options)
    task = app.task(base=AsyncDatabaseTask, bind=True, shared=False, name="one")(one)
    assert tuple(task.apply(throw=True).result) == (False, 1)
    db.coroutines.stop()
