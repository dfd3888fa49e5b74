"""Tasks that meet their soft time limit."""

import io
import time
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text

from support.project import tools
from support.project.app import db, task
from support.project.models import Row


@task()
def sleep_in_sql(self: Any, key: str, seconds: float = 60) -> None:
    self.db.add(Row(key=key))
    self.db.flush()
    self.db.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


@task()
def sleep_in_sql_caught(self: Any, key: str) -> None:
    self.db.add(Row(key=key, note="before the limit"))
    self.db.flush()
    try:
        self.db.execute(text("SELECT pg_sleep(60)"))
    except SoftTimeLimitExceeded:
        self.db.rollback()
    self.db.add(Row(key=key, note="after the limit"))


@task()
def write_steadily(self: Any, key: str, note: str) -> None:
    """Many short statements and savepoints: a limit strikes anywhere between or in them."""
    self.db.add(Row(key=key, note=note))
    for number in range(60):
        with self.db.begin_nested():
            self.db.add(Row(key=f"{key}-{number}", note=note))
        self.db.scalar(text("SELECT pg_backend_pid()"))


@task()
def busy(self: Any, key: str, catch: bool) -> None:
    """Meet the limit in Python code, between two statements."""
    self.db.add(Row(key=key, note="before the limit"))
    self.db.flush()
    try:
        while True:
            sum(range(1000))
    except SoftTimeLimitExceeded:
        if not catch:
            raise
    self.db.add(Row(key=key, note="after the limit"))


def nap(seconds: float) -> Any:
    """Return a statement that takes so long on the server."""
    return text(f"SELECT pg_sleep({seconds})" if db.engine.dialect.name == "postgresql" else f"SELECT SLEEP({seconds})")


def session_id(session: Any) -> int:
    """Return the number by which the server knows the connection."""
    postgresql = db.engine.dialect.name == "postgresql"
    return int(session.scalar(text("SELECT pg_backend_pid()" if postgresql else "SELECT CONNECTION_ID()")))


@task()
def wait_on_server(self: Any, key: str, how: str, caught: bool = False) -> str:
    """Wait 30 s for the server in the way that `how` names, and tell on which connection."""
    self.db.add(Row(key=key, note="before the limit"))
    self.db.flush()
    tools.say(key, session_id(self.db))
    try:
        if how == "copy":
            raw = self.db.connection().connection.driver_connection
            raw.cursor().copy_expert("COPY (SELECT pg_sleep(30)) TO STDOUT", io.StringIO())
        elif how == "lock" and db.engine.dialect.name == "postgresql":
            self.db.execute(text("SELECT pg_advisory_xact_lock(13)"))
        elif how == "lock":
            self.db.execute(text("SELECT GET_LOCK('thirteen', 30)"))
        elif how == "nested":
            with db.unit_of_work() as session:
                session.execute(nap(30))
        else:
            self.db.execute(nap(30))
    except SoftTimeLimitExceeded:
        if not caught:
            raise
        self.db.rollback()
        self.db.add(Row(key=key, note="after the limit"))
        return "caught"
    return "waited"


@task(autoretry_for=(SoftTimeLimitExceeded,), max_retries=1, default_retry_delay=0)
def wait_once(self: Any, key: str) -> str:
    self.db.add(Row(key=key, note=f"attempt {self.request.retries}"))
    self.db.flush()
    if not self.request.retries:
        self.db.execute(nap(30))
    return "second attempt"


@task()
def insert_with_slow_commit(self: Any, key: str) -> None:
    """The server needs 2 s for the COMMIT."""
    self.db.execute(text("INSERT INTO slow_ (key_) VALUES (:key)"), {"key": key})


@task()
def copy_and_large_object(self: Any, key: str) -> list[Any]:
    """Use what psycopg2 refuses where its wait callback is set."""
    raw = self.db.connection().connection.driver_connection
    raw.cursor().copy_expert("COPY rows_ (key_, note) FROM STDIN", io.StringIO(f"{key}\tcopied\n"))
    found = io.StringIO()
    raw.cursor().copy_expert(f"COPY (SELECT note FROM rows_ WHERE key_ = '{key}') TO STDOUT", found)
    large = raw.lobject(0, "wb")
    large.write(b"large")
    large.close()
    content = raw.lobject(large.oid, "rb").read()
    raw.lobject(large.oid).unlink()
    return [found.getvalue(), content.decode()]


@task()
def tell_session_id(self: Any, key: str) -> int:
    self.db.add(Row(key=key, note="next task"))
    return session_id(self.db)


@task()
def insert_slowly(self: Any, key: str, seconds: float) -> None:
    """Two statements, and a pause between them; any moment is one in which a limit may come."""
    self.db.add(Row(key=key, note="slowly"))
    self.db.flush()
    self.db.execute(nap(seconds / 3))
    time.sleep(seconds / 3)
    self.db.execute(nap(seconds / 3))
