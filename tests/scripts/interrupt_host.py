"""A process that plays a prefork pool process whose tasks meet their soft time limit anywhere.

Its one argument is JSON: url, strategy. Each line of its input is JSON, a scenario and what it is called with; each
line of its output what came of it.
"""

import gc
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
from sqlalchemy import event, func, select, text
from support import everywhere
from support.project.models import Row

from celery_alchemy import Alchemy, DatabaseTask, WorkerPool

settings = json.loads(sys.argv[1])
app = Celery("interrupts", broker="memory://", backend="cache+memory://", set_as_current=False)
app.conf.update(everywhere.SETTINGS)
app.conf.alchemy_database_url = settings["url"]
app.conf.alchemy_session_strategy = settings["strategy"]
# PyMySQL makes a new SSLContext, 20 ms of work, for every connection that replaces an interrupted one.
connect_args = {"ssl_disabled": True} if "pymysql" in settings["url"] else {}
app.conf.alchemy_engine_options = {"pool_timeout": 10, "connect_args": connect_args}
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


abandoned: list[Any] = []


@app.task(base=DatabaseTask, bind=True)
def abandon(self: DatabaseTask) -> None:
    """Do what a limit does that strikes in `__enter__`: the unit of work is open, and nobody will leave it."""
    self.db.execute(NAP)
    abandoned.append(db.unit_of_work())
    abandoned[-1].__enter__().execute(NAP)
    raise SoftTimeLimitExceeded


@app.task(base=DatabaseTask, bind=True)
def write_one(self: DatabaseTask, key: str) -> None:
    self.db.add(Row(key=key, note="one"))


@app.task(base=DatabaseTask, bind=True)
def collect(self: DatabaseTask, key: str) -> None:
    """Write two rows, and between them let the garbage collector close what `abandon` has left."""
    self.db.add(Row(key=key, note="before"))
    self.db.flush()
    abandoned.clear()
    gc.collect()
    self.db.add(Row(key=key, note="after"))


def interrupt_commit(key: str) -> tuple[str, str]:
    """Run a task whose limit strikes during its COMMIT."""
    event.listen(db.engine, "commit", lambda _: os.kill(os.getpid(), signal.SIGUSR1), once=True)
    return run(key, task=write_one)


def interrupt_connect(key: str) -> dict[str, Any]:
    """Run tasks whose limit strikes where a connection is checked out, and no Session knows of it yet."""
    engine: Any = db.engine
    connecting = engine._should_log_info  # what a Connection asks when it has just been given its pool's connection
    answer: dict[str, Any] = {}
    for unit in ("task", "block"):
        left = 1 if unit == "task" else 2  # the block inside the task connects second

        def strike() -> bool:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGUSR1)
            return bool(connecting())

        engine._should_log_info = strike
        answer[unit] = run(key, 0)[0], engine.pool.checkedout()
        engine._should_log_info = connecting
        answer[f"after the {unit}"] = run(key, 0)
    return answer


def after_abandon(key: str) -> dict[str, Any]:
    """Run tasks after one that left a unit of work open."""
    return {
        "commit": interrupt_commit(key),
        "abandon": run(task=abandon)[0],
        "commit afterwards": interrupt_commit(key),
        "collect": run(key, task=collect),
        "checked_out": db.engine.pool.checkedout(),
    }


NAP = text("SELECT pg_sleep(0.002)" if settings["url"].startswith("postgresql") else "SELECT SLEEP(0.002)")
sent = mmap.mmap(-1, 8)
tracers: dict[str, Any] = {}


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


def run(*arguments: Any, task: Any = write) -> tuple[str, str]:
    """Run a task as a worker does; return its state (`OUTSIDE` when Celery's own code failed) and the traceback."""
    task_id = uuid.uuid4().hex
    request = {"id": task_id, "task": task.name, "is_eager": False, "called_directly": False, "delivery_info": {}}
    result = tracers[task.name](task_id, arguments, {}, request)
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
        state, error, delay = "OUTSIDE", "", chance.uniform(0, typical * 1.3)
        signals += 1
        begun = settled = False
        while not settled:  # the limit may strike anywhere in here
            try:
                if not begun:
                    begun = True
                    os.write(sender, struct.pack("d", delay))
                    state, error = run(key, number)
                settle(signals)
                settled = True
            except SoftTimeLimitExceeded:
                pass
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
    global sender  # noqa: PLW0603
    sender = start_sender()
    db.start_worker(WorkerPool(name="prefork", concurrency=2, main_pid=os.getppid()))
    # As billiard does: after worker_process_init.
    signal.signal(signal.SIGUSR1, soft_timeout_sighandler)
    tracers.update({task.name: build_tracer(task.name, task, app=app) for task in (write, abandon, write_one, collect)})
    for line in sys.stdin:
        try:
            question = json.loads(line)
            answer = globals()[question.pop("scenario")](**question)
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
    db.stop()


if __name__ == "__main__":
    main()
