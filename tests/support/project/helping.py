"""Tasks whose work is done by threads and greenlets that they start, and wait for."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import text

from support.project import tools
from support.project.app import app, db, task
from support.project.models import Row


def start(how: str, work: Callable[[], Any]) -> Callable[[], Any]:
    """Run `work` beside the task; return what waits for it, and returns what it has returned."""
    if how == "gevent":
        import gevent

        return gevent.spawn(work).get  # type: ignore[no-any-return]
    if how == "eventlet":
        import eventlet

        return eventlet.spawn(work).wait  # type: ignore[no-any-return]
    if how == "executor":
        executor = ThreadPoolExecutor(1)
        return executor.submit(work).result
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()

    def wait() -> Any:
        thread.join()
        return found[0]

    return wait


def told(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or the error that it raises, as text."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@task()
def written_by_task(self: Any, key: str, note: str) -> None:
    self.db.add(Row(key=key, note=note))
    self.db.flush()
    self.db.execute(text("SELECT pg_sleep(0.05)"))


def write(key: str, note: str, way: str) -> str:
    """Write a row in a unit of work of this thread or greenlet."""
    if way == "called":
        written_by_task(key, note)
    elif way == "applied":
        written_by_task.apply(args=(key, note)).get(disable_sync_subtasks=False)
    elif way == "deeper":
        start("threads", lambda: None)()
        write(key, note, "block")
    else:
        with db.unit_of_work() as session:
            session.add(Row(key=key, note=note))
            session.flush()
            session.execute(text("SELECT pg_sleep(0.05)"))
    return "written"


@task()
def have_helpers(self: Any, key: str, how: str, ways: list[str], parties: int) -> list[str]:
    """Hold a connection, and wait for one helper for each of `ways`; `parties` tasks at once."""
    self.db.add(Row(key=key, note="task"))
    self.db.flush()
    tools.barrier(f"{key}-holding", parties)
    waits = [start(how, lambda way=way: told(lambda: write(key, way, way))) for way in ways]
    return [wait() for wait in waits]


@task()
def come_after_helpers(self: Any, key: str, how: str) -> list[str]:
    """Use the database when two helpers have begun; one ends first, the other when the task has written."""
    holds, goes_on = threading.Event(), threading.Event()

    def slow() -> str:
        with db.unit_of_work() as session:
            session.add(Row(key=key, note="slow"))
            session.flush()
            holds.set()
            goes_on.wait(30)
        return "written"

    first = start(how, lambda: told(slow))
    holds.wait(10)
    second = start(how, lambda: told(lambda: write(key, "quick", "block")))
    try:
        self.db.add(Row(key=key, note="task"))
        self.db.flush()
    finally:
        goes_on.set()
    return [first(), second()]


@task()
def have_a_helper_that_nests(self: Any, key: str, how: str) -> str:
    """The second slot is the helper's; a third, for a unit of work inside its own, is not there."""
    self.db.add(Row(key=key, note="task"))
    self.db.flush()

    def nest() -> str:
        with db.unit_of_work() as session:
            session.add(Row(key=key, note="helper"))
            session.flush()
            return write(key, "inside", "block")

    return str(start(how, lambda: told(nest))())


@app.task
def write_plainly(key: str) -> str:
    """Not a DatabaseTask."""
    return write(key, "plain", "block")
