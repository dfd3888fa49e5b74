"""A process that plays a prefork pool process whose tasks meet their soft time limit anywhere.

Its one argument is JSON: url, strategy. Each line of its input is JSON: how many tasks to interrupt, the key of their
rows and the seed; each line of its output what came of it.
"""

import contextlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
import uuid
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from billiard.pool import soft_timeout_sighandler
from celery import Celery
from celery.app.trace import build_tracer
from sqlalchemy import func, select, text
from support.project.models import Row

from celery_alchemy import Alchemy, DatabaseTask, WorkerPool

settings = json.loads(sys.argv[1])
app = Celery("interrupts", broker="memory://", backend="cache+memory://", set_as_current=False)
app.conf.alchemy_database_url = settings["url"]
app.conf.alchemy_session_strategy = settings["strategy"]
app.conf.alchemy_engine_options = {"pool_timeout": 10}
db = Alchemy(app)


@app.task(base=DatabaseTask, bind=True)
def write(self: DatabaseTask, key: str, number: int) -> int:
    """Write two rows in a transaction that is interrupted between, or does not exist."""
    self.db.add(Row(key=key, note=f"{number} first"))
    self.db.flush()
    with self.db.begin_nested():
        self.db.add(Row(key=key, note=f"{number} second"))
    self.db.execute(NAP)
    with db.unit_of_work() as other:
        other.scalar(select(func.count(Row.id)).where(Row.key == key))
    return number


NAP = text("SELECT pg_sleep(0.002)" if settings["url"].startswith("postgresql") else "SELECT SLEEP(0.002)")
sent = mmap.mmap(-1, 8)


def start_sender() -> int:
    """Start a process that sends SIGUSR1 some time after each number of seconds it reads; return where to write them.

    A signal of another process comes between any two bytecodes, as a pool process's does; one of our own would not.
    """
    reader, writer = os.pipe()
    target = os.getpid()
    if os.fork() == 0:
        os.close(writer)
        while data := os.read(reader, 8):
            time.sleep(struct.unpack("d", data)[0])
            os.kill(target, signal.SIGUSR1)
            sent[:8] = struct.pack("q", struct.unpack("q", sent[:8])[0] + 1)
        os._exit(0)
    os.close(reader)
    return writer


def settle(count: int) -> None:
    """Wait until `count` signals were sent, and have come."""
    while True:
        try:
            while struct.unpack("q", sent[:8])[0] < count:
                time.sleep(0.0002)
            time.sleep(0.0002)  # a signal that was sent has come when a system call returns
            return
        except SoftTimeLimitExceeded:
            pass


def run(key: str, number: int) -> tuple[str, str]:
    """Run the task as a worker does; return its state (`OUTSIDE` when Celery's own code failed) and the traceback."""
    task_id = uuid.uuid4().hex
    request = {"id": task_id, "task": write.name, "is_eager": False, "called_directly": False, "delivery_info": {}}
    result = tracer(task_id, (key, number), {}, request)
    error = str(getattr(result.retval, "traceback", ""))
    if result.info is None:
        return ("OUTSIDE" if error else "SUCCESS"), error
    return result.info.state, error


def interrupt(key: str, count: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    started = time.monotonic()
    for number in range(10):
        assert run(f"{key}-warm", number)[0] == "SUCCESS"
    typical = (time.monotonic() - started) / 10
    states: dict[str, int] = {}
    wrong: list[str] = []
    must, must_not = set(), set()
    signals = struct.unpack("q", sent[:8])[0]
    for number in range(count):
        state, error = "OUTSIDE", ""
        with contextlib.suppress(SoftTimeLimitExceeded):
            os.write(sender, struct.pack("d", chance.uniform(0, typical * 1.3)))
            state, error = run(key, number)
        settle(signals := signals + 1)
        states[state] = states.get(state, 0) + 1
        if state == "SUCCESS":
            must.add(number)
        elif state == "FAILURE" and "in run\n" in error:
            must_not.add(number)
            if "SoftTimeLimitExceeded" not in error.splitlines()[-1]:
                wrong.append(f"{number}: masked by {error}")
        if db.engine.pool.checkedout():
            wrong.append(f"{number}: {db.engine.pool.checkedout()} connections are not given back; {error}")
        if run(f"{key}-next", number) != ("SUCCESS", ""):
            wrong.append(f"{number}: the next task failed after {error}")
    return {"states": states, "wrong": wrong, "must": sorted(must), "must_not": sorted(must_not), "typical_s": typical}


def main() -> None:
    global tracer, sender  # noqa: PLW0603
    sender = start_sender()
    db.start_worker(WorkerPool(name="prefork", concurrency=2, main_pid=os.getppid()))
    # As billiard does: after worker_process_init.
    signal.signal(signal.SIGUSR1, soft_timeout_sighandler)
    tracer = build_tracer(write.name, write, app=app)
    for line in sys.stdin:
        try:
            answer = interrupt(**json.loads(line))
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
    db.stop()


if __name__ == "__main__":
    main()
