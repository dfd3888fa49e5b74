"""A process that forks while Engines and connection pools that celery-alchemy was never told of have transactions open.

Its one argument is JSON: url, key, and whether all are made and connected `before` there is an Alchemy. Each line of
its input names a kind of Engine, each line of its output is what came of a fork.
"""

import asyncio
import gc
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from celery import Celery
from sqlalchemy import Engine, create_engine, create_pool_from_url, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AssertionPool, NullPool, Pool, QueuePool, SingletonThreadPool, StaticPool

from celery_alchemy import Alchemy
from scripts.children import forked


class OfTheUser(QueuePool):
    """A class of connection pools that the user wrote."""


class Using:
    """What connects, and a transaction that it has open."""

    def __init__(self, connect: Callable[[], Any], key: str, *, alone: bool = False) -> None:
        self.connect, self.key = connect, key
        idle = None if alone else connect()
        self.held = self.open("parent")
        self.pids = [backend_pid(self.held)]
        if idle is not None:
            self.pids.append(backend_pid(idle))
            idle.rollback()
            idle.close()

    def open(self, note: str) -> Any:
        connection = self.connect()
        execute(connection, f"INSERT INTO rows_ (key_, note) VALUES ('{self.key}', '{note}')")
        return connection

    def spoil(self) -> None:
        """Do in the child what would end the parent's transaction."""
        for name in ("rollback", "close"):
            try:
                getattr(self.held, name)()
            except Exception:
                traceback.print_exc()
        self.held = None
        gc.collect()

    def work(self) -> int:
        connection = self.open("child")
        pid = backend_pid(connection)
        connection.commit()
        connection.close()
        return pid

    def finish(self) -> None:
        self.held.commit()
        self.held.close()


def execute(connection: Any, statement: str) -> Any:
    cursor = connection.cursor()
    cursor.execute(statement)
    row = cursor.fetchone() if cursor.description else None
    cursor.close()
    return row


def backend_pid(connection: Any) -> int:
    module = type(connection.dbapi_connection).__module__
    return execute(connection, "SELECT pg_backend_pid()" if module.startswith("psycopg") else "SELECT CONNECTION_ID()")[
        0
    ]


class InThread(Using):
    """The transaction is open in a thread, which alone holds the connection."""

    def __init__(self, connect: Callable[[], Any], key: str) -> None:
        self.local, ready, self.go_on = threading.local(), threading.Event(), threading.Event()

        def hold() -> None:
            super(InThread, self).__init__(connect, key)
            self.local.held, self.held = self.held, None
            ready.set()
            self.go_on.wait()
            self.local.held.commit()
            self.local.held.close()

        self.thread = threading.Thread(target=hold)
        self.thread.start()
        assert ready.wait(20)

    def spoil(self) -> None:
        gc.collect()

    def finish(self) -> None:
        self.go_on.set()
        self.thread.join(20)


class Detached(Using):
    """The connection was taken out of its connection pool; the child ends it by closing it."""

    def open(self, note: str) -> Any:
        connection = super().open(note)
        connection.detach()
        return connection


class InLoop(Using):
    """An AsyncEngine; the child has an event loop of its own."""

    def __init__(self, url: str, key: str) -> None:
        self.key = key
        self.engine = create_async_engine(url)
        self.loop = asyncio.new_event_loop()
        self.held, pid = self.loop.run_until_complete(self.begin("parent"))
        self.pids = [pid]

    async def begin(self, note: str) -> tuple[Any, int]:
        connection = await self.engine.connect()
        await connection.execute(
            text("INSERT INTO rows_ (key_, note) VALUES (:key, :note)"), {"key": self.key, "note": note}
        )
        return connection, await connection.scalar(text("SELECT pg_backend_pid()"))

    def spoil(self) -> None:
        gc.collect()

    def work(self) -> int:
        async def work() -> int:
            connection, pid = await self.begin("child")
            await connection.commit()
            await connection.close()
            return pid

        return asyncio.run(work())

    def finish(self) -> None:
        async def finish() -> None:
            await self.held.commit()
            await self.held.close()
            await self.engine.dispose()

        self.loop.run_until_complete(finish())


class Kinds:
    """Each returns what is in use."""

    def __init__(self, url: str) -> None:
        self.url = url

    def engine(self, key: str) -> Using:
        return Using(create_engine(self.url).raw_connection, key)

    def copy(self, key: str) -> Using:
        """What `execution_options` returns; the Engine itself is gone."""
        return Using(create_engine(self.url).execution_options(logging_token="copy").raw_connection, key)

    def full(self, key: str) -> Using:
        """Its one connection is checked out."""
        return Using(
            create_engine(self.url, pool_size=1, max_overflow=0, pool_timeout=5).raw_connection, key, alone=True
        )

    def disposed(self, key: str) -> Using:
        """Its first connection pool was replaced, while a connection of it was in use."""
        engine = create_engine(self.url)
        used = Using(engine.raw_connection, key)
        engine.dispose()
        return used

    def recreated(self, key: str) -> Using:
        engine = create_engine(self.url)
        engine.pool = engine.pool.recreate()
        return Using(engine.raw_connection, key)

    def with_class(self, key: str, kind: type[Pool], **options: Any) -> Using:
        return Using(create_engine(self.url, poolclass=kind).raw_connection, key, **options)

    def null(self, key: str) -> Using:
        return self.with_class(key, NullPool)

    def static(self, key: str) -> Using:
        return self.with_class(key, StaticPool, alone=True)

    def singleton(self, key: str) -> Using:
        return self.with_class(key, SingletonThreadPool, alone=True)

    def assertion(self, key: str) -> Using:
        return self.with_class(key, AssertionPool, alone=True)

    def of_the_user(self, key: str) -> Using:
        return self.with_class(key, OfTheUser)

    def without_engine(self, key: str) -> Using:
        engine: Engine = create_engine(self.url)
        arguments = engine.dialect.create_connect_args(make_url(self.url))
        return Using(QueuePool(lambda: engine.dialect.connect(*arguments[0], **arguments[1])).connect, key)

    def from_url(self, key: str) -> Using:
        return Using(create_pool_from_url(self.url).connect, key)

    def detached(self, key: str) -> Using:
        return Detached(create_engine(self.url).raw_connection, key)

    def in_thread(self, key: str) -> Using:
        return InThread(create_engine(self.url).raw_connection, key)

    def asyncio(self, key: str) -> Using:
        return InLoop(self.url, key)


def look(used: Using) -> dict[str, Any]:
    def child() -> int:
        used.spoil()
        return used.work()

    answer = forked(child)
    used.finish()
    return answer | {"parents": used.pids}


def main() -> None:
    settings = json.loads(sys.argv[1])
    kinds, key = Kinds(settings["url"]), settings["key"]
    used = {kind: getattr(kinds, kind)(f"{key}-{kind}") for kind in settings["before"]}
    gc.freeze()
    db = Alchemy(Celery("engines", set_as_current=False))
    for line in sys.stdin:
        kind = json.loads(line)["kind"]
        parent = os.getpid()
        try:
            answer = look(used.pop(kind, None) or getattr(kinds, kind)(f"{key}-{kind}"))
        except Exception:
            if os.getpid() != parent:
                raise
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
    del db


if __name__ == "__main__":
    main()
