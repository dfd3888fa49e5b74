"""Tasks that look at which Session they have."""

import asyncio
import contextvars
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import select, text

from celery_alchemy import DatabaseTask
from support.project import tools
from support.project.app import app, db, task
from support.project.models import Counter, Row


@task()
def untouched(self: Any) -> str:
    return "done"


@task()
def set_by_listener(self: Any) -> str:
    return str(self.db.scalar(text("SELECT current_setting('contract.listener')")))


@app.task
def plain(key: str) -> None:
    """Not a DatabaseTask: has no unit of work."""
    db.session.add(Row(key=key))


@app.task
def plain_with_unit(key: str) -> None:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note="unit of a plain task"))


@task()
def meet(self: Any, key: str, parties: int) -> dict[str, Any]:
    """Be in the middle of a transaction at the same time as the others."""
    mark = uuid.uuid4().hex
    self.db.info["mark"] = mark
    backend = self.db.scalar(text("SELECT pg_backend_pid()"))
    self.db.add(Row(key=key, note=mark))
    tools.barrier(f"{key}-in", parties)
    self.db.flush()
    seen = list(self.db.scalars(select(Row.note).where(Row.key == key)))
    again = self.db.scalar(text("SELECT pg_backend_pid()"))
    result = {
        "session": id(self.db),
        "backend": backend,
        "same": again == backend and self.db.info["mark"] == mark == db.session.info["mark"],
        "own rows only": seen == [mark],
    }
    tools.barrier(f"{key}-out", parties)
    return result


def write_from_down_the_stack(key: str) -> None:
    db.session.add(Row(key=key, note="db.session"))
    db.session.flush()


@task()
def down_the_stack(self: Any, key: str) -> dict[str, Any]:
    self.db.info["mark"] = key
    write_from_down_the_stack(key)
    seen = list(self.db.scalars(select(Row.note).where(Row.key == key)))
    return {"same": db.session.info.get("mark") == key, "seen by self.db": seen}


@task()
def session_only(self: Any, key: str) -> None:
    """Never says self.db."""
    write_from_down_the_stack(key)


def in_thread(function: Callable[[], Any]) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def in_executor(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


def in_context_thread(function: Callable[[], Any]) -> Any:
    context = contextvars.copy_context()
    return in_thread(lambda: context.run(function))


def in_to_thread(function: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.to_thread(function)

    return asyncio.run(main())


def in_gevent(function: Callable[[], Any]) -> Any:
    import gevent

    return gevent.spawn(function).get()


def in_eventlet(function: Callable[[], Any]) -> Any:
    import eventlet

    return eventlet.spawn(function).wait()


def in_greenlet(function: Callable[[], Any]) -> Any:
    import greenlet

    return greenlet.greenlet(function).switch()


HELPERS = {function.__name__.removeprefix("in_"): function for function in (
    in_thread, in_executor, in_context_thread, in_to_thread, in_gevent, in_eventlet, in_greenlet
)}  # fmt: skip


@task()
def helper(self: Any, key: str, kind: str) -> list[str]:
    """Use the task's Session in something that the task starts; return what that raises."""
    self.db.add(Row(key=key, note="the task's own"))
    self.db.flush()

    def use(write: Callable[[], Any]) -> str:
        try:
            write()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    row = Row(key=key, note="stolen")
    return [
        HELPERS[kind](lambda: use(lambda: self.db.add(row))),
        HELPERS[kind](lambda: use(lambda: db.session.add(row))),
    ]


@task()
def helper_with_unit(self: Any, key: str, kind: str) -> None:
    """What the error recommends: the helper opens a unit of work of its own; the task's is rolled back."""
    self.db.add(Row(key=key, note="the task's own"))
    self.db.flush()

    def write() -> None:
        with db.unit_of_work() as session:
            session.add(Row(key=key, note="the helper's own"))

    HELPERS[kind](write)
    raise RuntimeError("on purpose")


@app.task(base=DatabaseTask, bind=True)
def increment(self: DatabaseTask, key: str) -> int:
    """Read, modify, write."""
    counter = self.db.get_one(Counter, key, with_for_update=True)
    counter.value += 1
    return counter.value
