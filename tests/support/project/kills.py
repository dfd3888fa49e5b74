"""Tasks that are killed, and others that must not suffer from it."""

import os
import resource
from collections.abc import Callable
from typing import Any

from sqlalchemy import select, text

from support.project import tools
from support.project.app import task
from support.project.models import Counter, Row

LATE = {"acks_late": True, "reject_on_worker_lost": True}


def exit_at_once() -> None:
    os._exit(3)


DEADLY: dict[str, Callable[[], None]] = {"os._exit": exit_at_once}


def meet_death(self: Any, key: str, how: str) -> list[str]:
    """Lock the counter, write a row and die, or wait for death; live through the second attempt.

    Returns the rows of `key` that this attempt found.
    """
    attempt = tools.client().incr(tools.name("attempts", self.request.id))
    self.db.scalar(select(Counter.value).where(Counter.key == key).with_for_update())
    found = list(self.db.scalars(select(Row.note).where(Row.key == key)))
    self.db.add(Row(key=key, note=f"attempt {attempt}" if attempt > 1 or how != "commit" else "slow commit"))
    self.db.flush()
    if attempt > 1:
        return found
    tools.say(key, {"pid": os.getpid(), "backend": self.db.scalar(text("SELECT pg_backend_pid()"))})
    if how in DEADLY:
        DEADLY[how]()
    elif how == "statement":
        self.db.execute(text("SELECT pg_sleep(60)"))
    return found


early = task(name="die")(meet_death)
late = task(name="die_late", **LATE)(meet_death)


@task()
def take_lock(self: Any, key: str) -> int:
    """Wait for the lock of the counter; return how often it has been taken so."""
    counter = self.db.scalars(select(Counter).where(Counter.key == key).with_for_update()).one()
    counter.value += 1
    return counter.value


@task()
def run_out_of_memory(self: Any, key: str, how: str) -> None:
    """Write a row and want more memory than there is: for real under prefork, where the limit is the process's own."""
    self.db.scalars(select(Counter).where(Counter.key == key).with_for_update()).one()
    self.db.add(Row(key=key, note="out of memory"))
    self.db.flush()
    if how == "raised":
        raise MemoryError
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, hard))
    bytearray(16 << 30)


@task()
def bear(self: Any, key: str, note: str, seconds: float) -> int:
    """Write a row, and ask in a statement that takes a while for a number that belongs to this task alone."""
    number = int(note)
    self.db.add(Row(key=key, note=note))
    self.db.flush()
    found = self.db.scalar(text("SELECT :number + length(pg_sleep(:s)::text)"), {"number": number, "s": seconds})
    return int(found)
