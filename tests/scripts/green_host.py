"""A monkey patched process in which many greenlets open units of work.

Its one argument is JSON: library and before (see `patched`), url. Each line of its input names a scenario and what it
is called with, each line of its output is what came of it.
"""

from scripts.patched import join, kill, library, run, settings, sleep, spawn, timeout

# isort: split
# What stands above monkey patches, and comes first.
import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import Celery
from sqlalchemy import event, func, insert, select, text, update
from support.project.models import Counter, Row

from celery_alchemy import Alchemy, DatabaseTask, NoUnitOfWork, ReservedSlotsInUse, WorkerPool
from celery_alchemy.strategies.engines.held import RecordQueue
from scripts.children import forked
from scripts.gathering import Gathering

CONNECTIONS = 5


class Open:
    """Counts the open connections of an Engine, and remembers the most there were."""

    def __init__(self, engine: Any) -> None:
        self.now = self.most = 0
        event.listen(engine, "connect", self._opened)
        event.listen(engine, "close", self._closed)

    def _opened(self, *_: object) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def _closed(self, *_: object) -> None:
        self.now -= 1


def make_alchemy(strategy: str = "auto", **engine_options: Any) -> Alchemy:
    app = Celery("green", set_as_current=False)
    app.conf.alchemy_database_url = settings["url"]
    app.conf.alchemy_session_strategy = strategy
    app.conf.alchemy_engine_options = engine_options
    db = Alchemy(app)
    start(db)
    return db


def start(db: Alchemy) -> None:
    db.start_worker(WorkerPool(name=library, concurrency=200))


def in_task(db: Alchemy, body: Callable[[Any], Any]) -> Any:
    """Run `body(session)` in a task."""
    assert db.app is not None
    task = db.app.tasks.get("body") or db.app.task(base=DatabaseTask, bind=True, name="body")(call_with_session)
    return task.apply((body,)).get()


def call_with_session(task: Any, body: Callable[[Any], Any]) -> Any:
    return body(task.db)


def nap(db: Alchemy, seconds: float) -> Any:
    """Return a statement that waits on the server."""
    name = db.engine.dialect.name
    return text(f"SELECT pg_sleep({seconds})" if name == "postgresql" else f"SELECT SLEEP({seconds})")


def checked_out(db: Alchemy) -> int:
    return db.engine.pool.checkedout()


# The scenarios.


def sleep_together(db: Alchemy, seconds: float = 0.5, count: int = 10) -> dict[str, int]:
    """Let `count` greenlets sleep on the server at once; count another one's ticks while all of them do."""
    gathering, asleep, ticks = Gathering(count), 0, 0

    def sleeper(session: Any) -> None:
        nonlocal asleep
        session.execute(text("SELECT 1"))
        gathering.wait()
        asleep += 1
        session.execute(nap(db, seconds))
        asleep -= 1

    def ticker() -> None:
        nonlocal ticks
        while not all_done:
            sleep(0.005)
            ticks += asleep == count

    all_done: list[bool] = []
    ticking = spawn(ticker)
    run(lambda number: in_task(db, sleeper), count)
    all_done.append(True)
    join([ticking])
    return {"ticks": ticks, "checked_out": checked_out(db)}


def share(db: Alchemy, key: str) -> dict[str, int]:
    """Let 200 greenlets share five connections."""
    opened = Open(db.engine)
    done = []

    def body(number: int, session: Any) -> None:
        session.execute(insert(Row).values(key=key, note=str(number)))
        session.execute(nap(db, 0.005))
        assert session.scalar(select(func.count(Row.id)).where(Row.key == key, Row.note == str(number))) == 1
        done.append(number)

    run(lambda number: in_task(db, partial(body, number)), 200)
    return {"done": len(done), "checked_out": checked_out(db), "most": opened.most}


def share_early(key: str) -> dict[str, int]:
    """The same on an Engine that was made and used before the monkey patch; and it must not block."""
    from scripts import early

    start(early.db)
    result = share(early.db, key) | {"ticks": sleep_together(early.db, 0.2, CONNECTIONS)["ticks"]}
    early.db.dispose()
    return result


def die_unremoved(db: Alchemy) -> dict[str, int]:
    """2000 greenlets, one after another, leave a unit of work open and die."""
    sessions: list[weakref.ref[Any]] = []
    stale = 0

    def body() -> None:
        nonlocal stale
        for lookup in (db.session, getattr(db.strategy, "scoped_session", db.session)):
            with contextlib.suppress(NoUnitOfWork):
                lookup()
                stale += 1
        unit = db.units.begin(db.unit_options(commits=True), "left open", "block")
        sessions.append(weakref.ref(unit.session))

    for _ in range(2000):
        join([spawn(body)])
    gc.collect()
    return {"stale": stale, "alive": sum(session() is not None for session in sessions)}


def interrupt(db: Alchemy, key: str, seed: int, count: int) -> dict[str, Any]:
    """Of `count` greenlets kill half, and let a quarter time out, anywhere; then use every connection at once."""
    chance = random.Random(seed)
    # A COMMIT that is interrupted may have happened.
    ended, done, wrong = [], [], []

    def write(number: int, session: Any) -> None:
        session.execute(insert(Row).values(key=key, note=str(number)))
        answer = session.execute(text("SELECT CAST(:mine AS CHAR(9))"), {"mine": str(number)}).scalar_one()
        session.execute(nap(db, 0.01))
        if answer.strip() != str(number):
            wrong.append((number, answer))
        ended.append(str(number))

    def body(number: int) -> None:
        try:
            with timeout(chance.uniform(0.001, 0.08)) if number % 4 == 1 else contextlib.nullcontext():
                in_task(db, partial(write, number))
                done.append(str(number))
        except BaseException as error:
            if isinstance(error, Exception):
                raise

    for batch in range(0, count, 25):
        greenlets = [spawn(body, number) for number in range(batch, batch + 25)]
        killed = greenlets[::2]
        chance.shuffle(killed)
        for greenlet in killed:
            sleep(chance.uniform(0, 0.005))
            kill(greenlet)
        join(greenlets)
    left = checked_out(db)
    gathering = Gathering(CONNECTIONS)

    def use(session: Any) -> None:
        session.execute(text("SELECT 1"))
        gathering.wait()

    run(lambda number: in_task(db, use), CONNECTIONS)
    return {"wrong": wrong, "ended": ended, "done": done, "checked_out": left}


def nest(db: Alchemy) -> dict[str, int]:
    """On a full connection pool, every greenlet opens a second unit of work at once, and then a third."""
    opened, gathering = Open(db.engine), Gathering(CONNECTIONS)
    nested_gathering, last_gathering = Gathering(CONNECTIONS), Gathering(CONNECTIONS)
    refused = nested = 0

    def deeper(level: int) -> None:
        nonlocal refused, nested
        try:
            with db.unit_of_work() as session:
                session.execute(text("SELECT 1"))
                nested += 1
                nested_gathering.wait()
                if level < 3:
                    deeper(level + 1)
                else:
                    raise AssertionError("more connections than there are")
        except ReservedSlotsInUse:
            refused += 1
            last_gathering.wait()

    def body(session: Any) -> None:
        session.execute(text("SELECT 1"))
        gathering.wait()
        deeper(2)

    run(lambda number: in_task(db, body), CONNECTIONS)
    return {"nested": nested, "refused": refused, "most": opened.most, "checked_out": checked_out(db)}


def kill_waiting(db: Alchemy) -> dict[str, int]:
    """Kill greenlets that wait for a connection, tasks and helpers; then use all connections."""
    opened, waiting = Open(db.engine), []
    done = []

    def use(session: Any) -> None:
        session.execute(text("SELECT 1"))
        done.append(session)

    def help_out() -> None:
        with contextlib.suppress(BaseException), db.unit_of_work() as session:
            use(session)

    def be_task() -> None:
        with contextlib.suppress(BaseException):
            in_task(db, use)

    with db.unit_of_work() as outer:
        outer.execute(text("SELECT 1"))
        with db.unit_of_work() as inner:
            inner.execute(text("SELECT 1"))
            waiting += [spawn(body) for body in (help_out, be_task) * 4]
            sleep(0.1)
            early = len(done)
            for greenlet in waiting:
                kill(greenlet)
            sleep(0.05)
    join(waiting)
    run(lambda number: help_out() if number % 2 else be_task(), 8)
    return {"early": early, "done": len(done), "most": opened.most, "checked_out": checked_out(db)}


def kill_called() -> list[int]:
    """Kill a greenlet that waits for a connection in the moment in which it is called: the next one is called."""
    found = []
    for kill_first in (True, False):
        queue: Any = RecordQueue()
        served: list[Any] = []
        waiting = [spawn(lambda queue=queue, served=served: served.append(queue.get(True, 20))) for _ in range(3)]
        sleep(0.1)
        if kill_first:
            kill(waiting[0])
        queue.put("record")
        if not kill_first:
            kill(waiting[0])
        for _ in range(100):
            if not served:
                sleep(0.05)
        found.append(len(served))
        for _ in range(2):
            queue.put("record")
        join(waiting)
    return found


def count_up(db: Alchemy, key: str) -> dict[str, int]:
    """20 greenlets read, change and write one number ten times each."""
    with db.unit_of_work() as session:
        session.add(Counter(key=key, value=0))

    def body(session: Any) -> None:
        value = session.scalar(select(Counter.value).where(Counter.key == key))
        sleep(0)
        session.execute(update(Counter).where(Counter.key == key).values(value=value + 1))

    run(lambda number: [in_task(db, body) for _ in range(10)], 20)
    with db.unit_of_work() as session:
        value = session.get(Counter, key).value
    return {"value": value, "checked_out": checked_out(db)}


def fork_in_greenlet(db: Alchemy, key: str) -> Any:
    """A greenlet forks while another one is in the middle of a transaction; the child lets that one run on."""
    gathering, go_on, answers = Gathering(2), Gathering(2), []

    def other() -> None:
        with db.unit_of_work() as session:
            session.execute(insert(Row).values(key=key, note="other"))
            gathering.wait()
            go_on.wait()

    def forks() -> None:
        with db.unit_of_work() as session:
            session.execute(insert(Row).values(key=key, note="parent"))
            gathering.wait()

            def child() -> None:
                sleep(0.01)
                with db.unit_of_work() as own:
                    own.execute(insert(Row).values(key=key, note="child"))

            answers.append(forked(child))
            go_on.wait()

    join([spawn(other), spawn(forks)])
    return answers[0]


def subprocess_in_greenlet(db: Alchemy, key: str) -> None:
    """gevent forks in Python for a subprocess: the hooks run between fork and exec."""
    with db.unit_of_work() as session:
        session.execute(insert(Row).values(key=key, note="parent"))
        subprocess.run([sys.executable, "-S", "-c", "pass"], check=True, timeout=20)


def main() -> None:
    parent = os.getpid()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            arguments = dict(question["arguments"])
            options = arguments.pop("alchemy", None)
            if options is not None:
                arguments["db"] = make_alchemy(**options)
            answer = globals()[question["scenario"]](**arguments)
            if options is not None:
                arguments["db"].dispose()
        except Exception:
            if os.getpid() != parent:
                raise
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
