"""What the tasks do to which the faults happen. The number of a task is how long it sleeps on the server, in ms."""

from __future__ import annotations

import gc
import os
from dataclasses import replace

from celery.exceptions import Ignore
from sqlalchemy import literal, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.orm.session import _sessions as sessions

from ..tasks.models import Entry
from ..tasks.workloads import Call, sleep_on_server, workload, write_entry

SESSIONS, OBJECTS = "sessions", "objects"
STEPS = 20
RETRIES = 2


@workload("Insert one line, sleep on the server.", 1)
def fault_write(session: Session, call: Call) -> None:
    write_entry(session, call, 1)
    sleep_on_server(session, call.number / 1000, call.number)


@workload(f"{STEPS} INSERTs and SELECTs in one transaction: a limit strikes anywhere between or in them.", STEPS)
def fault_steps(session: Session, call: Call) -> None:
    for number in range(STEPS):
        write_entry(session, call, 1)
        found = session.scalar(select(literal(number)))
        assert found == number, f"{found} instead of {number}"


@workload(f"Insert one line, retry {RETRIES} times.", 1)
def fault_retry(session: Session, call: Call) -> None:
    write_entry(session, call, 1)
    if call.attempt < RETRIES:
        raise call.task.retry(countdown=0)


@workload("Insert one line, raise Ignore.")
def fault_ignore(session: Session, call: Call) -> None:
    write_entry(session, call, 1)
    raise Ignore


@workload("Write down, in two lines, how many Sessions and how many objects this process holds.", 2)
def fault_count(session: Session, call: Call) -> None:
    gc.collect()
    for kind, count in ((SESSIONS, len(sessions)), (OBJECTS, len(gc.get_objects()))):
        session.add(Entry(transfer_id=f"{kind}:{os.getpid()}:{call.task_id}", account_id=1, amount=count))


@workload("Touch nothing.")
def fault_probe(session: Session, call: Call) -> None:
    pass


@workload("SELECT 1.")
def fault_use(session: Session, call: Call) -> None:
    session.execute(select(literal(1)))


WRITE, MANY, RETRY, IGNORE = fault_write, fault_steps, fault_retry, fault_ignore
SURELY = replace(WRITE, name="fault_surely", summary="The same, retried.", retried_on=(OperationalError,))
ONCE = replace(WRITE, name="fault_once", summary="The same, whose effects are to happen once.", once=True)
COUNT, PROBE, USE = fault_count, fault_probe, fault_use
FAULT_TASKS = (COUNT, WRITE, SURELY, ONCE, MANY, RETRY, IGNORE, PROBE, USE)
