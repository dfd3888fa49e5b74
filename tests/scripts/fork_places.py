"""Where forks happen: under locks, inside units of work and tasks, in threads, and twice."""

import contextlib
import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import event
from support.project.models import Row

from celery_alchemy import Alchemy, DatabaseTask
from scripts.children import forked
from scripts.fork_host import ACTIONS, Held, backend_pid, make_alchemy, new_work
from scripts.fork_host import fork as fork_with

between_hooks: Callable[[], None] | None = None


def _in_between() -> None:
    if between_hooks is not None:
        between_hooks()


# `before` hooks run in reverse: this one, the first to be registered, after those of celery-alchemy.
os.register_at_fork(before=_in_between)


@contextlib.contextmanager
def thread(body: Callable[[threading.Event, threading.Event], None]) -> Iterator[None]:
    """Run `body` in a thread up to where it sets the first event; let it go on, by the second, after the block."""
    reached, go_on = threading.Event(), threading.Event()
    runner = threading.Thread(target=body, args=(reached, go_on))
    runner.start()
    try:
        assert reached.wait(20), "the thread did not come so far"
        yield
    finally:
        go_on.set()
        runner.join(20)
        assert not runner.is_alive()


class Places:
    """Scenarios; each returns what is to be said of it in JSON."""

    def __init__(self, url: str, strategy: str) -> None:
        self.url, self.strategy = url, strategy
        self.db: Alchemy
        self.key = ""

    def alchemy(self, role: str = "pool process") -> Alchemy:
        return make_alchemy(self.url, self.strategy, role)

    def work(self) -> dict[str, Any]:
        """Fork a child that does work of its own."""
        return forked(lambda: new_work(self.db, self.key))

    def task(self, body: Callable[[Any], Any]) -> Any:
        """Run `body` as an eager task."""
        app: Any = self.db.app
        run = app.task(base=DatabaseTask, bind=True, name=f"scenario-{self.key}")(body)
        return run.apply()

    def connection_pool_locked(self) -> Any:
        new_work(self.db, self.key, "parent")
        pool: Any = self.db.engine.pool

        def hold(reached: threading.Event, go_on: threading.Event) -> None:
            with pool._pool.mutex, pool._overflow_lock:
                reached.set()
                go_on.wait()

        with thread(hold):
            return self.work()

    def engine_being_made(self) -> Any:
        """Another thread is making the Engine: inside `Alchemy`'s and the Engine source's locks."""
        return self._stopped_in(lambda engine, stop: stop())

    def engine_connecting_first(self) -> Any:
        """Another thread is inside the Engine's very first connect, which SQLAlchemy does under a lock."""
        return self._stopped_in(lambda engine, stop: event.listen(engine, "first_connect", lambda *_: stop()))

    def _stopped_in(self, listen: Callable[[Any, Callable[[], None]], None]) -> Any:
        self.db.stop()
        self.db = self.alchemy("script")
        here, there = threading.get_ident(), threading.Event()

        def use(reached: threading.Event, go_on: threading.Event) -> None:
            def stop() -> None:
                if threading.get_ident() != here and not there.is_set():
                    there.set()
                    reached.set()
                    go_on.wait()

            self.db.on_engine(lambda engine: listen(engine, stop))
            new_work(self.db, self.key, "parent")

        with thread(use):
            return self.work()

    def inside_block_child_returns(self) -> Any:
        return self._inside_block(lambda: None)

    def inside_block_child_raises(self) -> Any:
        return self._inside_block(lambda: 1 / 0)

    def inside_block_child_exits(self) -> Any:
        return self._inside_block(lambda: sys.exit(0))

    def _inside_block(self, leave: Callable[[], Any]) -> Any:
        """Fork in a `with` block that the child leaves too, by `leave`."""
        reader, writer = os.pipe()
        parent = os.getpid()
        try:
            with self.db.unit_of_work() as session:
                session.add(Row(key=self.key, note="parent"))
                before = backend_pid(session)
                child = os.fork()
                if child == 0:
                    leave()
                else:
                    os.waitpid(child, 0)
                    return {"same": backend_pid(session) == before, "child": json.loads(os.read(reader, 4096))}
        except BaseException as error:
            if os.getpid() == parent:
                raise
            gc.collect()
            note = type(error).__name__
            new_work(self.db, self.key)
            os.write(writer, json.dumps(note).encode())
            if isinstance(error, SystemExit):
                raise
            os._exit(0)
        finally:
            if os.getpid() == parent:
                os.close(reader)
                os.close(writer)
        os.write(writer, b'"nothing was raised"')
        os._exit(0)

    def inside_task(self) -> Any:
        def body(task: Any) -> Any:
            task.db.add(Row(key=self.key, note="parent"))
            task.db.flush()

            def child() -> Any:
                try:
                    task.db.add(Row(key=self.key, note="stray"))
                except Exception as error:
                    return type(error).__name__, new_work(self.db, self.key)
                return "nothing was raised", None

            return forked(child)

        return self.task(body).get()

    def inside_task_child_returns(self) -> Any:
        """The child comes back from the task: that must not be reported as a success."""
        reader, writer = os.pipe()
        parent = os.getpid()

        def body(task: Any) -> int:
            task.db.add(Row(key=self.key, note="parent"))
            task.db.flush()
            child = os.fork()
            if child:
                os.waitpid(child, 0)
            return child

        result = self.task(body)
        if os.getpid() != parent:
            new_work(self.db, self.key)
            os.write(writer, json.dumps(result.state).encode())
            os._exit(0)
        with open(reader) as answers:
            os.close(writer)
            return {"parent": result.state, "child": json.loads(answers.read())}

    def grandchild(self) -> Any:
        """A grandchild lays hands on all that its parent and its grandparent hold."""
        held = Held(self.db, self.key)

        def child() -> Any:
            own = Held(self.db, f"{self.key}-child")

            def grandchild() -> Any:
                for inherited in (held, own):
                    for action in ("raw_close", "connection_close", "session_rollback", "drop"):
                        ACTIONS[action](inherited)
                return new_work(self.db, self.key, "grandchild")

            answer = forked(grandchild)
            return answer, own.finish()

        return forked(child), held.finish()

    def from_thread(self) -> Any:
        """A thread forks; the main thread holds a transaction of its own, whose stack the child does not run on."""
        held = Held(self.db, self.key)
        answers = []

        def run(reached: threading.Event, go_on: threading.Event) -> None:
            own = Held(self.db, f"{self.key}-thread")

            def child() -> Any:
                for inherited in (own, held):
                    ACTIONS["drop"](inherited)
                return new_work(self.db, self.key)

            answers.append(forked(child))
            own.finish()
            reached.set()

        with thread(run):
            pass
        return answers[0], held.finish()

    def thread_local_of_another_thread(self) -> Any:
        """CPython frees the thread-locals of the threads that did not come along before any hook runs in the child."""
        local = threading.local()

        def hold(reached: threading.Event, go_on: threading.Event) -> None:
            local.connection = self.db.engine.raw_connection()
            cursor = local.connection.cursor()
            cursor.execute(f"INSERT INTO rows_ (key_, note) VALUES ('{self.key}', 'parent')")
            cursor.close()
            reached.set()
            go_on.wait()
            local.connection.commit()
            local.connection.close()

        with thread(hold):
            return self.work()

    def two_threads_fork_at_once(self) -> Any:
        """Between the hooks of one fork and the fork itself, another thread forks."""
        global between_hooks  # noqa: PLW0603
        held = Held(self.db, self.key)
        here, others = threading.get_ident(), []

        def other_thread_forks() -> None:
            if threading.get_ident() == here:
                other = threading.Thread(target=lambda: others.append(self.work()))
                other.start()
                other.join()

        between_hooks = other_thread_forks
        try:
            answer = fork_with(held, "connection_close")
        finally:
            between_hooks = None
        return answer, others[0], held.finish()
