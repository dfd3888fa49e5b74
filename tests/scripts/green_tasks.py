"""Tasks of the tests' project for real gevent and eventlet workers."""

import time
from typing import Any

from sqlalchemy import text
from support.project.app import app, db, task

from scripts.gathering import Gathering


class Round:
    """Ten tasks that sleep on the server at the same time."""

    def __init__(self, count: int) -> None:
        self.gathering, self.asleep, self.done = Gathering(count), 0, 0


rounds: dict[str, Round] = {}


@task()
def sleep_on_server(self: Any, key: str, count: int) -> None:
    this = rounds.setdefault(key, Round(count))
    name = db.engine.dialect.name
    self.db.execute(text("SELECT 1"))
    this.gathering.wait()
    this.asleep += 1
    self.db.execute(text("SELECT pg_sleep(0.5)" if name == "postgresql" else "SELECT SLEEP(0.5)"))
    this.asleep -= 1
    this.done += 1


@app.task
def tick(key: str, count: int) -> int:
    """Return how often this greenlet came to run while all `count` others slept on the server."""
    this, ticks = rounds.setdefault(key, Round(count)), 0
    while this.done < count:
        time.sleep(0.005)
        ticks += this.asleep == count
    return ticks
