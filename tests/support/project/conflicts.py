"""Tasks whose body runs again when its transaction has lost against another one; and what the server says of them."""

import time
from typing import Any

from sqlalchemy import func, insert, select, text, update

from support.project import tools
from support.project.app import db, task
from support.project.models import Counter, Row

attempts: dict[str, int] = {}


def count_attempt(self: Any) -> int:
    attempts[self.request.id] = attempts.get(self.request.id, 0) + 1
    return attempts[self.request.id]


@task(isolation_retries=100)
def lock_both_again(self: Any, key: str, first: str, second: str) -> int:
    """Lock two counters in the order given, the way to deadlocks; add one to each."""
    number = count_attempt(self)
    self.db.execute(text("SET LOCAL deadlock_timeout = '30ms'"))
    db.on_commit(lambda: tools.say(key, number))
    for counter in (first, second):
        self.db.execute(update(Counter).where(Counter.key == counter).values(value=Counter.value + 1))
        time.sleep(0.01)
    return number


@task()
def number_again(self: Any, key: str) -> int:
    """Count the rows and write one with that number: right only if serializable. Runs again as the setting says."""
    self.db.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    count = self.db.scalar(select(func.count()).select_from(Row).where(Row.key == key))
    time.sleep(0.01)
    self.db.add(Row(key=key, note=str(count)))
    return count_attempt(self)


@task(isolation_retries=2)
def always_loses(self: Any, key: str) -> None:
    tools.say(key, count_attempt(self))
    self.db.execute(text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$"))


@task(isolation_retries=2)
def loses_after_a_commit(self: Any, key: str, how: str) -> None:
    """What was committed inside must not be done twice."""
    tools.say(key, count_attempt(self))
    if how == "nested":
        with db.unit_of_work() as session:
            session.add(Row(key=key, note=how))
    elif how == "core":
        with db.engine.begin() as connection:
            connection.execute(insert(Row).values(key=key, note=how))
    elif how == "eager":
        note_row.apply((key, how))
    elif how == "callback":
        db.on_commit(lambda: note_row.apply((key, how)))
        self.db.commit()
    else:
        with db.unit_of_work() as session:
            session.execute(select(Row).where(Row.key == key))
    self.db.execute(text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$"))


@task()
def note_row(self: Any, key: str, note: str) -> None:
    self.db.add(Row(key=key, note=note))


@task(isolation_retries=5)
def fails_otherwise(self: Any, key: str) -> None:
    tools.say(key, count_attempt(self))
    self.db.execute(text("SELECT 1/0"))


@task(isolation_retries=1000, soft_time_limit=1)
def loses_until_its_limit(self: Any, key: str) -> None:
    self.db.execute(text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$"))


@task(isolation_retries=5)
def call_one_that_loses(self: Any, key: str) -> int:
    """It is called like a function: the transaction is this task's, and so is the new attempt."""
    number = count_attempt(self)
    self.db.add(Row(key=key, note=f"attempt {number}"))
    self.db.flush()
    lose_first(key, number)
    return number


@task(isolation_retries=5)
def lose_first(self: Any, key: str, number: int) -> None:
    if number < 3:
        always_loses(key)


@task(name="shop.tasks.a_name_that_is_much_longer_than_postgresql_likes_it")
def show_name(self: Any, key: str) -> list[str]:
    """What everyone sees of this task's connection, in a statement and between two."""
    self.db.add(Row(key=key, note="row"))
    self.db.flush()
    pid = self.db.scalar(text("SELECT pg_backend_pid()"))
    return name_of(pid)


@task(name="name_of")
def name_of(self: Any, pid: int) -> list[str]:
    with tools.observer().connect() as connection:
        sql = text("SELECT application_name, state FROM pg_stat_activity WHERE pid = :pid")
        return list(connection.execute(sql, {"pid": pid}).one())


@task()
def sleep_in_a_statement(self: Any, key: str, seconds: float) -> None:
    self.db.add(Row(key=key, note="row"))
    self.db.flush()
    self.db.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})
