"""A process that uses its Engine, holds transactions open, and forks children that lay hands on them.

Its one argument is JSON: url, strategy (`engine` for one that the user brings) and role, see `make_alchemy`. Each line
of its input is a question, each line of its output the answer.
"""

import contextlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, insert, select, text
from support.project.models import Row

from celery_alchemy import Alchemy, WorkerPool
from scripts.children import forked

POOL_SIZE = 5


def make_alchemy(url: str, strategy: str, role: str = "pool process") -> Alchemy:
    """Return an Alchemy in a process that plays prefork's `pool process`, its `main process`, or a `script`."""
    app = Celery("forks", set_as_current=False)
    if strategy == "engine":
        db = Alchemy(app, engine=create_engine(url, pool_size=POOL_SIZE))
    else:
        app.conf.alchemy_database_url = url
        app.conf.alchemy_session_strategy = strategy
        app.conf.alchemy_engine_options = {"pool_size": POOL_SIZE}
        db = Alchemy(app)
    if role != "script":
        main_pid = os.getpid() if role == "main process" else os.getppid()
        db.start_worker(WorkerPool(name="prefork", concurrency=2, main_pid=main_pid))
    return db


def backend_pid(connection: Any) -> int:
    """Return the server's number for a Connection or a Session."""
    dialect = connection.get_bind().dialect if hasattr(connection, "get_bind") else connection.dialect
    return connection.scalar(
        text("SELECT pg_backend_pid()" if dialect.name == "postgresql" else "SELECT CONNECTION_ID()")
    )


def local_port(connection: Any) -> int:
    """Return the port at which a Connection's socket begins; 0 when it is a Unix socket."""
    driver = connection.connection.dbapi_connection
    descriptor = driver.fileno() if hasattr(driver, "fileno") else driver._sock.fileno()
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        return duplicate.getsockname()[1] if duplicate.family == socket.AF_INET else 0


class Held:
    """What the parent holds while it forks: a Session and a Connection in the middle of a transaction each, and a
    third connection idle in the connection pool."""

    def __init__(self, db: Alchemy, key: str) -> None:
        self.db, self.key = db, key
        with db.engine.connect() as idle:
            self.idle_pid, self.idle_port = backend_pid(idle), local_port(idle)
            self.block = db.unit_of_work()
            self.session = self.block.__enter__()
            self.session.add(Row(key=key, note="session"))
            self.session.flush()
            self.connection = db.engine.connect()
            self.connection.execute(insert(Row).values(key=key, note="connection"))
        self.raw = [held.connection.dbapi_connection for held in (self.session.connection(), self.connection)]
        self.pids = [backend_pid(self.session), backend_pid(self.connection), self.idle_pid]
        self.ports = [local_port(self.session.connection()), local_port(self.connection)]

    def _ask_idle(self) -> int:
        with self.db.engine.connect() as idle:
            return backend_pid(idle)

    def finish(self) -> dict[str, Any]:
        """Ask the idle connection, in a thread that holds no other, then commit both transactions."""
        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(self._ask_idle).result()
        self.connection.commit()
        self.connection.close()
        self.block.__exit__(None, None, None)
        return {"idle_before": self.idle_pid, "idle_after": answered}


def new_work(db: Alchemy, key: str, note: str = "child") -> int:
    """Write a row in a unit of work of its own; return the server's number for its connection."""
    with db.unit_of_work() as session:
        session.add(Row(key=key, note=note))
        return backend_pid(session)


def attempt(action: Callable[[], Any]) -> str | None:
    """Return the name of the exception that `action` raises; None when it raises none."""
    try:
        action()
    except Exception as error:
        traceback.print_exc()
        return type(error).__name__
    return None


def inherited_session(held: Held) -> dict[str, Any]:
    """Ask the parent's Session for the parent's data, before and after a rollback."""
    answers = []

    def ask() -> None:
        answers.append(list(held.session.scalars(select(Row.note).where(Row.key == held.key))))

    return {
        "first": attempt(ask),
        "rollback": attempt(held.session.rollback),
        "second": attempt(ask),
        "answers": answers,
        "no_unit_of_work": attempt(held.db.session),
    }


def inherited_connection(held: Held) -> dict[str, Any]:
    """Ask the parent's Connection for the parent's data, before and after a rollback."""
    answers = []

    def ask() -> None:
        answers.append(list(held.connection.scalars(select(Row.note).where(Row.key == held.key))))

    return {
        "first": attempt(ask),
        "rollback": attempt(held.connection.rollback),
        "second": attempt(ask),
        "answers": answers,
    }


def raw_query(held: Held) -> dict[str, Any]:
    """Use the driver's own connections, past SQLAlchemy."""
    answers = []

    def ask(raw: Any) -> None:
        cursor = raw.cursor()
        cursor.execute("SELECT note FROM rows_")
        answers.append(list(cursor.fetchall()))

    return {"first": attempt(lambda: [ask(raw) for raw in held.raw]), "answers": answers}


def drop(held: Held) -> None:
    import gc

    db, key = held.db, held.key
    vars(held).clear()
    held.db, held.key = db, key
    gc.collect()


def each(held: Held, name: str) -> list[str | None]:
    return [attempt(getattr(raw, name)) for raw in held.raw]


def leave_block(held: Held, error: BaseException | None = None) -> str | None:
    return attempt(lambda: held.block.__exit__(type(error) if error else None, error, None))


ACTIONS: dict[str, Callable[[Held], Any]] = {
    "exit": lambda held: None,
    "work": lambda held: None,
    "sys_exit": lambda held: sys.exit(0),
    "raise": lambda held: 1 / 0,
    "kill": lambda held: os.kill(os.getpid(), 9),
    "inherited_session": inherited_session,
    "inherited_connection": inherited_connection,
    "raw_query": raw_query,
    "session_close": lambda held: attempt(held.session.close),
    "session_rollback": lambda held: attempt(held.session.rollback),
    "session_commit": lambda held: attempt(held.session.commit),
    "session_invalidate": lambda held: attempt(held.session.invalidate),
    "connection_close": lambda held: attempt(held.connection.close),
    "connection_rollback": lambda held: attempt(held.connection.rollback),
    "connection_commit": lambda held: attempt(held.connection.commit),
    "connection_invalidate": lambda held: attempt(held.connection.invalidate),
    "connection_detach": lambda held: attempt(held.connection.detach),
    "raw_close": lambda held: each(held, "close"),
    "raw_rollback": lambda held: each(held, "rollback"),
    "engine_dispose": lambda held: attempt(held.db.engine.dispose),
    "db_dispose": lambda held: attempt(held.db.dispose),
    "drop": drop,
    "scoped_remove": lambda held: attempt(held.db.session.remove),
    "strategy_remove": lambda held: attempt(getattr(held.db.strategy, "scoped_session", held.db.session).remove),
    "leave_block": leave_block,
    "fail_block": lambda held: leave_block(held, ValueError("in the child")),
    "stop": lambda held: attempt(held.db.stop),
}
#: After these nothing can be done in the child, or is meant to be.
LAST = {"exit", "sys_exit", "raise", "kill"}


def fork(held: Held, action: str) -> dict[str, Any]:
    def child() -> Any:
        result = ACTIONS[action](held)
        if action in LAST:
            return None
        return {"result": result, "pid": new_work(held.db, held.key), "parents": held_pids}

    held_pids = held.pids
    return forked(child, plain_exit=action in {"sys_exit", "raise"})


def main() -> None:
    db = make_alchemy(**json.loads(sys.argv[1]))
    held: Held | None = None
    parent = os.getpid()
    for line in sys.stdin:
        question = json.loads(line)
        answer: Any = None
        try:
            if "hold" in question:
                held = Held(db, question["hold"])
                answer = {"ports": held.ports, "idle_port": held.idle_port, "pids": held.pids}
            elif "fork" in question:
                answer = fork(held, question["fork"])
            elif "finish" in question:
                answer = held.finish()
                held = None
        except Exception:
            if os.getpid() != parent:
                raise
            answer = {"failed": traceback.format_exc()}
            with contextlib.suppress(Exception):
                held.finish()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
