"""Tasks whose effects happen once, however often they are delivered."""

import time
from typing import Any

from support.project import tools
from support.project.app import task
from support.project.models import Row


def leave_row(self: Any, key: str) -> Row:
    row = Row(key=key, note=self.name)
    self.db.add(row)
    return row


@task(exactly_once="first", acks_late=True)
def once_first(self: Any, key: str, seconds: float = 0.0) -> int:
    row = leave_row(self, key)
    self.db.flush()
    tools.say(key, "begun")
    time.sleep(seconds)
    return row.id


@task(exactly_once="last", acks_late=True)
def once_last(self: Any, key: str, seconds: float = 0.0) -> int:
    row = leave_row(self, key)
    self.db.flush()
    tools.say(key, "begun")
    time.sleep(seconds)
    return row.id


@task(exactly_once=True, acks_late=True)
def once_meeting(self: Any, key: str, parties: int) -> str:
    leave_row(self, key)
    self.db.flush()
    tools.barrier(key, parties)
    return "done"
