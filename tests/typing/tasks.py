"""What type checkers know of tasks, with celery-types: read by mypy --strict and by pyright, never run."""

from typing import Annotated, Any, assert_type

from celery import Celery, chain, shared_task
from celery.result import AsyncResult
from sqlalchemy import Engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import (
    Alchemy,
    AsyncDatabaseTask,
    CurrentAsyncSession,
    CurrentSession,
    DatabaseTask,
    UseDatabase,
    late,
    outbox_table,
)

app = Celery("shop")
db = Alchemy(app)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


outbox_table(Base.metadata)


# -- as Celery writes it: `self.db` is typed, arguments are as far as celery-types knows them


@app.task(base=DatabaseTask, bind=True)
def create(self: DatabaseTask, name: str) -> None:
    assert_type(self.db, Session)
    assert_type(self.session_for("reports"), Session)
    self.db.add(User(name=name))
    self.db.commit()
    create.delay_on_commit("ada")
    create.apply_async_on_commit(("ada",), countdown=5)


@shared_task(base=DatabaseTask, bind=True, commit_on_success=False)
def shared(self: DatabaseTask, number: int) -> int:
    return self.db.scalars(select(User.id).where(User.id > number)).one()


class Import(DatabaseTask):
    def run(self, number: int) -> str:
        return self.db.scalars(select(User.name).where(User.id == number)).one()


importer = app.register_task(Import())
importer.delay_on_commit(1)


# -- as `@db.task` writes it: arguments and result are typed everywhere


@db.task
def bound(self: DatabaseTask, name: str, age: int = 0) -> int:
    assert_type(self.db, Session)
    return age


@db.task(acks_late=True, read_only=True)
def with_options(self: DatabaseTask, name: str) -> str:
    return name


@db.task
def injected(session: CurrentSession, name: str) -> list[int]:
    assert_type(session, Session)
    return list(session.scalars(select(User.id).where(User.name == name)))


@db.task
def bound_and_injected(self: DatabaseTask, session: CurrentSession, name: str) -> str:
    return f"{self.request.id} {name} {session.scalar(text('SELECT 1'))}"


@db.task
def plain(name: str) -> float:
    assert_type(db.session, Session)
    return 1.0


@db.task
async def async_bound(self: AsyncDatabaseTask, name: str, age: int = 0) -> int:
    assert_type(self.db, AsyncSession)
    return age


@db.task(acks_late=True)
async def async_injected(session: CurrentAsyncSession, name: str) -> list[int]:
    return list(await session.scalars(select(User.id).where(User.name == name)))


@db.task
async def async_bound_and_injected(self: AsyncDatabaseTask, session: CurrentAsyncSession, name: str) -> str:
    return name


@db.task(read_only=True)
async def async_plain(name: str) -> float:
    return 1.0


async def async_callers() -> None:
    assert_type(async_bound.delay("ada", age=3), AsyncResult[int])
    assert_type(async_bound.delay_on_commit("ada"), AsyncResult[int])
    assert_type(await async_bound("ada"), int)
    assert_type(async_injected.delay("ada"), AsyncResult[list[int]])
    assert_type(await async_injected("ada"), list[int])
    assert_type(async_bound_and_injected.delay_on_commit("ada"), AsyncResult[str])
    assert_type(await async_plain(name="ada"), float)
    assert_type(async_plain.db, AsyncSession)


def callers(user: User) -> None:
    assert_type(bound.delay("ada", age=3), AsyncResult[int])
    assert_type(bound.delay_on_commit("ada", age=3), AsyncResult[int])
    assert_type(bound("ada"), int)
    assert_type(with_options.delay_on_commit("ada"), AsyncResult[str])
    assert_type(injected.delay("ada"), AsyncResult[list[int]])
    assert_type(injected("ada"), list[int])
    assert_type(bound_and_injected.delay_on_commit("ada"), AsyncResult[str])
    assert_type(plain.delay_on_commit(name="ada"), AsyncResult[float])
    bound.delay_on_commit(late(lambda: user.name))
    db.delay_on_commit(chain(bound.s("ada"), plain.s()))


# -- the extension


@db.on_engine
def listen(engine: Engine) -> None:
    assert_type(db.engine, Engine)


def outside(session: Session) -> None:
    with db.unit_of_work(read_only=True) as own:
        assert_type(own, Session)
    with db.follow(session) as followed:
        assert_type(followed, Session)

    @db.on_commit
    def committed() -> None: ...


@app.task(base=DatabaseTask)
def several(day: str, session: CurrentSession, reports: Annotated[Session, UseDatabase("reports")]) -> Any:
    return session.scalar(text("SELECT 1")), reports.scalar(text("SELECT 1"))
