"""What the tasks do to which the faults happen. The number of a task is how long it sleeps on the server, in ms."""

from __future__ import annotations

import gc
import os

from celery.exceptions import Ignore
from sqlalchemy import literal, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.orm.session import _sessions as sessions

from ..models import Entry
from ..workloads import Call, Workload, sleep_on_server, write_entry

SESSIONS, OBJECTS = "sessions", "objects"
STEPS = 20
RETRIES = 2


def _write(session: Session, call: Call) -> None:
    write_entry(session, call, 1)
    sleep_on_server(session, call.number / 1000, call.number)


def _steps(session: Session, call: Call) -> None:
    """Many short statements: a limit strikes anywhere between or in them."""
    for number in range(STEPS):
        write_entry(session, call, 1)
        found = session.scalar(select(literal(number)))
        assert found == number, f"{found} instead of {number}"


def _retry(session: Session, call: Call) -> None:
    write_entry(session, call, 1)
    if call.attempt < RETRIES:
        raise call.task.retry(countdown=0)


def _ignore(session: Session, call: Call) -> None:
    write_entry(session, call, 1)
    raise Ignore


def _count(session: Session, call: Call) -> None:
    """Write down, in two lines, how many Sessions and how many objects this process holds."""
    gc.collect()
    for kind, count in ((SESSIONS, len(sessions)), (OBJECTS, len(gc.get_objects()))):
        session.add(Entry(transfer_id=f"{kind}:{os.getpid()}:{call.task_id}", account_id=1, amount=count))


def _nothing(session: Session, call: Call) -> None:
    pass


def _use(session: Session, call: Call) -> None:
    session.execute(select(literal(1)))


WRITE = Workload("fault_write", "Insert one line, sleep on the server.", _write, 1)
SURELY = Workload("fault_surely", "The same, retried on OperationalError.", _write, 1, retried_on=(OperationalError,))
MANY = Workload("fault_steps", f"{STEPS} INSERTs and SELECTs in one transaction.", _steps, STEPS)
RETRY = Workload("fault_retry", f"Insert one line, retry {RETRIES} times.", _retry, 1)
IGNORE = Workload("fault_ignore", "Insert one line, raise Ignore.", _ignore, 0)
PROBE = Workload("fault_probe", "Touch nothing.", _nothing, 0)
USE = Workload("fault_use", "SELECT 1.", _use, 0)
COUNT = Workload("fault_count", "Write down how many Sessions and objects this process holds.", _count, 2)
FAULT_TASKS = (COUNT, WRITE, SURELY, MANY, RETRY, IGNORE, PROBE, USE)
