"""Tasks that are killed, and others that must not suffer from it."""

import os
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
