"""A process that forks in awkward places and from awkward Engines; see `fork_host` for plain forks.

Its one argument is JSON: url and strategy, see `fork_host`. Each line of its input names a scenario, each line of its
output is what came of it.
"""

import gc
import json
import os
import random
import subprocess
import sys
import threading
import traceback
from typing import Any

from celery import Celery
from sqlalchemy import Connection, Engine, create_engine, insert
from support.project.models import Row

from celery_alchemy import Alchemy
from scripts.children import forked
from scripts.fork_host import ACTIONS, LAST, Held, backend_pid, new_work
from scripts.fork_host import fork as fork_with
from scripts.fork_places import Places


class Scenarios(Places):
    """All scenarios, those of `Places` too."""

    def connected_before_first_use(self) -> Any:
        """The user's Engine opens a transaction before anything of celery-alchemy was used."""
        engine = create_engine(self.url)
        db = Alchemy(Celery("early", set_as_current=False), engine=engine)
        return self._dropped_in_child(db, self._writing(engine))

    def connected_before_alchemy(self) -> Any:
        """The user's Engine has a transaction open before there is an Alchemy."""
        engine = create_engine(self.url)
        writing = self._writing(engine)
        db = Alchemy(Celery("late", set_as_current=False), engine=engine)
        new_work(db, self.key, "unit")
        return self._dropped_in_child(db, writing)

    def _writing(self, engine: Engine) -> list[Connection]:
        connection = engine.connect()
        connection.execute(insert(Row).values(key=self.key, note="parent"))
        return [connection]

    def _dropped_in_child(self, db: Alchemy, writing: list[Connection]) -> Any:
        def child() -> None:
            writing.clear()
            gc.collect()

        answer = forked(child)
        writing[0].commit()
        writing[0].close()
        db.engine.dispose()
        return answer

    def subprocess_in_block(self) -> Any:
        """A subprocess inherits nothing, whether Python forks for it (`preexec_fn`) or not."""
        with self.db.unit_of_work() as session:
            session.add(Row(key=self.key, note="parent"))
            before = backend_pid(session)
            for options in ({}, {"preexec_fn": lambda: None}, {"close_fds": False}):
                subprocess.run([sys.executable, "-S", "-c", "pass"], check=True, timeout=20, **options)
            return {"same": backend_pid(session) == before}

    def multiprocessing_in_task(self) -> Any:
        """A process that a task starts writes a row."""
        import multiprocessing

        import billiard

        def body(task: Any) -> list[int]:
            task.db.add(Row(key=self.key, note="parent"))
            before = backend_pid(task.db)
            codes = []
            for library in (multiprocessing.get_context("fork"), billiard.get_context("fork")):
                process = library.Process(target=new_work, args=(self.db, self.key))
                process.start()
                process.join(20)
                codes.append(process.exitcode)
            return [*codes, backend_pid(task.db) - before]

        return self.task(body).get()

    def many_forks(self, count: int, seed: int) -> Any:
        """Fork `count` children that do the worst; the parent's transactions are open all the time, and a thread of it
        takes the locks of the connection pool again and again."""
        chance = random.Random(seed)
        held = Held(self.db, self.key)
        actions = sorted(set(ACTIONS) - {"raise", "strategy_remove"})
        descriptors = len(os.listdir("/dev/fd"))
        bad, used, done = [], 0, threading.Event()

        def use() -> None:
            nonlocal used
            while not done.is_set():
                with self.db.engine.connect() as connection:
                    connection.exec_driver_sql("SELECT 1")
                used += 1

        thread = threading.Thread(target=use)
        thread.start()
        for _ in range(count):
            action = chance.choice(actions)
            if action in LAST:
                answer = fork_with(held, action)
            else:
                answer = forked(lambda action=action: ACTIONS[action](held) and None)
            if answer["status"] != {"kill": -9}.get(action, 0) or "error" in answer:
                bad.append((action, answer))
        done.set()
        thread.join()
        new_descriptors = len(os.listdir("/dev/fd")) - descriptors
        return {"bad": bad, "new_descriptors": new_descriptors, "used": used, "finished": held.finish()}


def main() -> None:
    scenarios = Scenarios(**json.loads(sys.argv[1]))
    parent = os.getpid()
    for line in sys.stdin:
        question = json.loads(line)
        scenarios.db, scenarios.key = scenarios.alchemy(), question["key"]
        try:
            answer = getattr(scenarios, question["scenario"])(*question["arguments"])
        except Exception:
            if os.getpid() != parent:
                raise
            answer = {"failed": traceback.format_exc()}
        scenarios.db.dispose()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
