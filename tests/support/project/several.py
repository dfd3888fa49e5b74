"""Tasks over two databases, `self.db` and one called reports: how each ending treats both."""

import time
from typing import Annotated, Any

from celery.exceptions import Ignore
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, CurrentSession, UseDatabase
from support.project import tools
from support.project.app import app, db, task
from support.project.endings import Boom
from support.project.models import Child, Row, User

reports = Alchemy(app, database="reports")
Reports = Annotated[Session, UseDatabase("reports")]


def write(session: Session, key: str, note: str) -> None:
    session.add(Row(key=key, note=note))


@task(max_retries=1)
def end_both(self: Any, key: str, ending: str, session: CurrentSession, there: Reports) -> Any:
    """Write to both databases, then end so."""
    if ending == "retry" and self.request.retries:
        return "second"
    write(session, key, "here")
    write(there, key, "there")
    session.flush()
    there.flush()
    assert session is self.db
    assert there is reports.session()
    assert there is db.databases["reports"].session()
    assert there is self.session_for("reports")
    assert session is not there
    if ending == "raises":
        raise Boom("on purpose")
    if ending == "ignored":
        raise Ignore
    if ending == "retry":
        raise self.retry(countdown=0)
    if ending == "commit fails here":
        session.add(Child(parent_id=-1))
    if ending == "commit fails there":
        there.add(Child(parent_id=-1))
    if ending == "flush fails here":
        session.add_all([User(name=key), User(name=key)])
    if ending == "broken there":
        there.connection().exec_driver_sql("SAVEPOINT one")
        try:
            there.execute(text("SELECT 1/0"))
        except Exception:
            return "swallowed"
    if ending == "replaced":
        raise self.replace(see_both.s(key))
    return "done"


@task()
def see_both(self: Any, key: str) -> list[int]:
    counting = select(Row).where(Row.key == key)
    return [len(one.scalars(counting).all()) for one in (self.db, self.session_for("reports"))]


@task(commit_on_success=False)
def commit_neither(self: Any, key: str, there: Reports) -> None:
    write(self.db, key, "here")
    write(there, key, "there")


@task(read_only=True)
def read_both(self: Any, key: str, there: Reports) -> str:
    see_both.run  # noqa: B018 - the attribute is there
    write(there, key, "must not be there")
    return "not reached"


@task()
def use_there_only(self: Any, key: str) -> None:
    write(self.session_for("reports"), key, "there")


@task()
def call_back_from_both(self: Any, key: str, fails: bool, there: Reports) -> None:
    write(self.db, key, "here")
    write(there, key, "there")
    db.on_commit(lambda: tools.say(key, ["here", tools.committed(key)]))
    reports.on_commit(lambda: tools.say(key, ["there", tools.committed(key)]))
    if fails:
        self.db.add(Child(parent_id=-1))


@task()
def open_blocks(self: Any, key: str, there: Reports) -> None:
    """A block of the default database is over both; one of another database over that alone."""
    write(self.db, key, "task here")
    write(there, key, "task there")
    try:
        with db.unit_of_work() as inner:
            assert reports.session() is not there
            write(inner, key, "inner here")
            write(reports.session, key, "inner there")
            inner.flush()
            reports.session.flush()
            raise Boom
    except Boom:
        pass
    with reports.unit_of_work() as alone:
        assert alone is not there
        assert reports.session() is alone
        assert db.session() is self.db
        write(alone, key, "alone there")
    assert reports.session() is there


@task()
def leave_there_in_transaction(self: Any, key: str) -> None:
    """A hard limit, or SIGKILL, comes while both are in a transaction."""
    write(self.db, key, "here")
    write(reports.session, key, "there")
    self.db.flush()
    reports.session.flush()
    tools.say(key, "both are open")
    time.sleep(20)


@task(soft_time_limit=1)
def limited_there(self: Any, key: str, there: Reports) -> None:
    write(self.db, key, "here")
    write(there, key, "there")
    self.db.flush()
    there.execute(text("SELECT pg_sleep(20)"))


@task()
def hold_both(self: Any, key: str, first: str) -> None:
    """Take a connection of one database, and then one of the other: not all in the same order."""
    sessions = [self.db, self.session_for("reports")]
    for session in sessions if first == "here" else reversed(sessions):
        session.execute(text("SELECT pg_sleep(0.05)"))
        write(session, key, "held")


@app.task
def pools() -> dict[str, Any]:
    return {
        name: [one.strategy.name, one.strategy.max_connections, one.engine.pool.checkedout(), one.engine.pool.size()]
        for name, one in db.databases.items()
    }
