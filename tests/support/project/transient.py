"""Tasks that meet database errors which pass by themselves, with and without `autoretry_for`."""

import contextlib
from typing import Any

from sqlalchemy import func, select, text, update

from celery_alchemy import TransientDatabaseError
from support.project import tools
from support.project.app import db, task
from support.project.models import Counter, Row

SURELY = {"autoretry_for": (TransientDatabaseError,), "default_retry_delay": 0.05, "max_retries": 400}


def sleep(session: Any, seconds: float) -> None:
    function = "SLEEP" if session.get_bind().dialect.name == "mysql" else "pg_sleep"
    session.execute(text(f"SELECT {function}(:seconds)"), {"seconds": seconds})


def write(self: Any, key: str, note: str, until: float | str) -> int:
    """Write a row, stay in a statement for so many seconds, or until the gate is open (see `support.gates`)."""
    tools.say(f"{key}-{note}", "begun")
    self.db.add(Row(key=key, note=note))
    self.db.flush()
    if isinstance(until, str):
        self.db.execute(select(Counter.value).where(Counter.key == until).with_for_update(read=True))
    else:
        sleep(self.db, until)
    return int(self.request.retries) + 1


write_once = task(name="write_once")(write)
write_surely = task(name="write_surely", **SURELY)(write)


@task(**SURELY)
def lock_both(self: Any, first: str, second: str) -> int:
    """Lock two counters in the order given, the way to deadlocks; add one to each."""
    self.db.execute(text("SET LOCAL deadlock_timeout = '30ms'"))
    for key in (first, second):
        self.db.execute(update(Counter).where(Counter.key == key).values(value=Counter.value + 1))
        sleep(self.db, 0.005)
    return int(self.request.retries) + 1


@task(**SURELY)
def number(self: Any, key: str) -> int:
    """Count the rows and write one with that number: right only if the transactions are serializable."""
    self.db.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    count = self.db.scalar(select(func.count()).select_from(Row).where(Row.key == key))
    sleep(self.db, 0.01)
    self.db.add(Row(key=key, note=str(count)))
    return int(self.request.retries) + 1


@task(**SURELY)
def lock_impatiently(self: Any, key: str) -> int:
    """Lock the counter without waiting for it."""
    counter = self.db.scalars(select(Counter).where(Counter.key == key).with_for_update(nowait=True)).one()
    sleep(self.db, 0.01)
    counter.value += 1
    return int(self.request.retries) + 1


@task(**SURELY)
def swallow_and_go_on(self: Any, key: str) -> int:
    """Meet a serialization failure, hide it, go on; the unit of work does not let that pass."""
    self.db.add(Row(key=key, note=f"attempt {self.request.retries + 1}"))
    self.db.flush()
    if self.request.retries == 0:
        with contextlib.suppress(TransientDatabaseError):
            self.db.execute(text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$"))
    return int(self.request.retries) + 1


@task(**SURELY)
def hold_and_want_more(self: Any, key: str, note: str) -> int:
    """Hold a connection, and open a unit of work inside: refused at once where it could wait for itself."""
    self.db.add(Row(key=key, note=note))
    self.db.flush()
    sleep(self.db, 0.02)
    with db.unit_of_work() as inner:
        inner.add(Row(key=f"{key}-inner", note=note))
    return int(self.request.retries) + 1
