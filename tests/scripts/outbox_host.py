"""Transactions with messages, and senders, that are killed at random moments; see `tests/test_outbox.py`.

Its one argument is JSON: url, broker, queue. Each line of its input names a key, how many and a seed.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from celery import Celery
from support.project.models import Row

from celery_alchemy import Alchemy, DatabaseTask
from celery_alchemy.strategies.features import outbox as rows
from celery_alchemy.workers.sending import outbox

settings: dict[str, Any] = json.loads(sys.argv[1])
app = Celery("outbox", broker=settings["broker"], set_as_current=False)
app.conf.update(alchemy_database_url=settings["url"], alchemy_outbox=True, task_default_queue=settings["queue"])
db = Alchemy(app)


@app.task(base=DatabaseTask, name="note")
def note(transaction: int, part: int) -> None:
    pass


def transact(key: str, number: int) -> None:
    with db.unit_of_work() as session:
        session.add(Row(key=key, note=str(number)))
        for part in (1, 2, 3):
            note.delay_on_commit(number, part)


def send_all() -> None:
    while any(outbox.send_waiting(db)):
        pass


def send_rest() -> None:
    """Send what is there, that of those too who were killed, and whose leases must be over first."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        send_all()
        with db.unit_of_work() as session:
            left = rows.count(session, rows.chosen_table())
        if not left.waiting:
            return
        time.sleep(0.05)


def killed(work: Callable[[], None], after_s: float) -> bool:
    """Do `work` in a child that gets so long; return whether it had to be killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            os.write(writer, b".")
            work()
        finally:
            os._exit(0)
    os.close(writer)
    os.read(reader, 1)  # it has begun
    os.close(reader)
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0002)
    os.kill(pid, signal.SIGKILL)
    return bool(os.WIFSIGNALED(os.waitpid(pid, 0)[1]))


def play(key: str, count: int, seed: int) -> dict[str, int]:
    chance = random.Random(seed)
    started = time.monotonic()
    assert not killed(lambda: transact(f"{key}-warm", -1), 10)
    typical_s = time.monotonic() - started
    deaths = 0
    for number in range(count):
        deaths += killed(lambda number=number: transact(key, number), chance.uniform(0, 1.3 * typical_s))
        if number % 5 == 4:
            deaths += killed(send_all, chance.uniform(0, typical_s))
    send_rest()
    return {"killed": deaths}


def main() -> None:
    outbox.LEFTOVERS_EVERY_S = 0.0
    rows.LEASE_S = 1.0
    for line in sys.stdin:
        print(json.dumps(play(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
