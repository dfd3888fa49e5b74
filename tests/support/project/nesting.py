"""Tasks that call tasks, and units of work inside tasks."""

import contextlib
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as ConnectionPoolTimeout

from celery_alchemy import CeleryAlchemyError
from support.project import tools
from support.project.app import app, db, task
from support.project.endings import Boom
from support.project.models import Row


@task()
def unit_inside(self: Any, key: str, inner_fails: bool, outer_fails: bool) -> dict[str, bool]:
    self.db.info["mark"] = "outer"
    self.db.add(Row(key=key, note="outer"))
    self.db.flush()
    seen = {}
    try:
        with db.unit_of_work() as session:
            seen["own"] = session is not self.db and "mark" not in session.info
            session.info["mark"] = "inner"
            seen["db.session is inner"] = db.session.info["mark"] == "inner"
            session.add(Row(key=key, note="inner"))
            session.flush()
            if inner_fails:
                raise Boom("inner, on purpose")
    except Boom:
        pass
    seen["outer untouched"] = self.db.info["mark"] == "outer" and self.db.in_transaction()
    seen["db.session is outer"] = db.session.info["mark"] == "outer"
    if outer_fails:
        tools.say(key, seen)
        raise Boom("outer, on purpose")
    return seen


@task()
def callee(self: Any, key: str, fails: bool = False) -> int:
    self.db.add(Row(key=key, note="callee"))
    self.db.flush()
    if fails:
        raise Boom("callee, on purpose")
    return id(self.db)


@app.task
def plain_caller(key: str, callee_fails: bool) -> None:
    """Not a DatabaseTask: calls one like a function."""
    with contextlib.suppress(Boom):
        callee(key, callee_fails)


@task(commit_on_success=False)
def discarding_callee(self: Any, key: str) -> int:
    self.db.add(Row(key=key, note="callee"))
    self.db.flush()
    return id(self.db)


@task()
def caller(self: Any, key: str, callee_fails: bool = False, caller_fails: bool = False) -> bool:
    """Call another task like a function."""
    self.db.add(Row(key=key, note="caller"))
    try:
        same = callee(key, callee_fails) == id(self.db)
    except Boom:
        same = True
    self.db.add(Row(key=key, note="caller again"))
    self.db.flush()
    if caller_fails:
        raise Boom("caller, on purpose")
    return same


@task()
def caller_of_discarding(self: Any, key: str) -> bool:
    return discarding_callee(key) == id(self.db)


@task()
def recurse(self: Any, key: str, depth: int, fails: bool = False) -> list[int]:
    self.db.add(Row(key=key, note=f"depth {depth}"))
    self.db.flush()
    sessions = [id(self.db)]
    if depth:
        sessions += self(key, depth - 1, fails)
    elif fails:
        raise Boom("at the bottom, on purpose")
    return sessions


@task()
def applied(self: Any, key: str, fails: bool = False) -> bool:
    self.db.add(Row(key=key, note="inner"))
    self.db.flush()
    if fails:
        raise Boom("inner, on purpose")
    return "mark" in self.db.info


@task()
def apply_inside(self: Any, key: str, inner_fails: bool, outer_fails: bool) -> None:
    """Run another task eagerly: it has a request, so a Session, of its own."""
    self.db.info["mark"] = "outer"
    self.db.add(Row(key=key, note="outer"))
    self.db.flush()
    result = applied.apply(args=(key, inner_fails), throw=False)
    if not inner_fails and result.result:
        raise RuntimeError("the inner task had the Session of the outer one")
    if self.db.info.get("mark") != "outer" or not self.db.in_transaction():
        raise RuntimeError("the outer Session did not survive")
    if outer_fails:
        raise Boom("outer, on purpose")


@task()
def nested_at_once(self: Any, key: str, parties: int) -> str:
    """Open a second unit of work while all others hold a connection; let go of nothing before all have tried."""
    outer = self.db.scalar(text("SELECT pg_backend_pid()"))
    tools.barrier(f"{key}-holding", parties)
    try:
        with db.unit_of_work() as session:
            inner = session.scalar(text("SELECT pg_backend_pid()"))
            tools.barrier(f"{key}-nested", parties + 1)  # the test comes too
            return "own connection" if inner != outer else "shared the connection"
    except (CeleryAlchemyError, ConnectionPoolTimeout) as error:
        tools.barrier(f"{key}-nested", parties + 1)
        return f"{type(error).__name__}: {error}"


@task()
def nested_thrice(self: Any, key: str) -> list[bool]:
    """Units of work inside units of work, one after the other and in each other."""
    self.db.add(Row(key=key, note="task"))
    for turn in range(3):
        with db.unit_of_work() as session:
            session.add(Row(key=key, note=f"turn {turn}"))
    self.db.flush()
    return [self.db.in_transaction()]
