"""FastAPI with an AsyncSession: `await session.commit()` sends the task, and the event loop goes on meanwhile.

pip install "../..[postgresql]" "celery[redis]" "sqlalchemy[asyncio]" fastapi uvicorn
celery -A shop worker --loglevel=INFO
uvicorn shop:api
curl -X POST localhost:8000/users/ada
curl localhost:8000/users
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from celery import Celery
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celery_alchemy import Alchemy, CurrentSession, DatabaseTask

URL = os.environ.get("SHOP_DATABASE_URL", "postgresql+psycopg://localhost/shop")

app = Celery("shop", broker=os.environ.get("SHOP_BROKER", "redis://localhost"))
app.conf.alchemy_database_url = URL
db = Alchemy(app)

engine = create_async_engine(URL)
async_session = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "shop_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Welcome(Base):
    __tablename__ = "shop_welcomes"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    saw_user: Mapped[bool]


@app.task(base=DatabaseTask)
def welcome(name: str, session: CurrentSession) -> None:
    user = session.scalars(select(User).where(User.name == name)).first()
    session.add(Welcome(name=name, saw_user=user is not None))


async def request_session() -> AsyncIterator[AsyncSession]:
    async with async_session() as session:
        with db.follow(session):  # what is sent on commit waits for this Session
            yield session


RequestSession = Annotated[AsyncSession, Depends(request_session)]


@asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


api = FastAPI(lifespan=lifespan)


@api.post("/users/{name}")
async def create_user(name: str, session: RequestSession) -> str:
    welcome.delay_on_commit(name)  # before the first statement, or after: it is sent when the endpoint commits
    session.add(User(name=name))
    await session.flush()
    if name.startswith("bad"):
        await session.rollback()
        raise HTTPException(400)
    await session.commit()
    return name


@api.get("/users")
async def list_users(session: RequestSession) -> dict[str, list[str]]:
    return {
        "users": list(await session.scalars(select(User.name).order_by(User.id))),
        "welcomed": list(await session.scalars(select(Welcome.name).order_by(Welcome.id))),
        "too_early": list(await session.scalars(select(Welcome.name).where(~Welcome.saw_user))),
    }
