"""Runs the code of pages of documentation, each in a child process of its own.

Its one argument is JSON: the folder to work in. Each line of its input is a page, its name and its code; each line of
its output what the page has said, if it failed, or null. Its tasks are called, where their parameters are among
`VALUES`.
"""

import contextlib
import inspect
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from celery import Task
from sqlalchemy import create_engine, text

import celery_alchemy
from celery_alchemy import Alchemy

VALUES = {"name": "ada", "user_id": 1, "old": "ada", "new": "Ada", "number": 7, "numbers": [1, 2], "prefix": "a"}
VALUES |= {"source": 1, "target": 2, "amount": 3}


def prepare(folder: Path) -> None:
    """Make the database that pages find: two tables, and a user ada."""
    folder.mkdir()
    os.chdir(folder)
    engine = create_engine("sqlite:///shop.sqlite3")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE users (id INTEGER PRIMARY KEY, name VARCHAR NOT NULL)"))
        connection.execute(text("INSERT INTO users (name) VALUES ('ada')"))
    engine.dispose()


def run(name: str, code: str) -> None:
    """Run a page, then each of its tasks; raise what it raises."""
    found: dict[str, Any] = {"__name__": "shop", "__annotations__": {}}
    exec(compile(code.replace("{cwd}", os.getcwd()), name, "exec", dont_inherit=True), found)
    for task in [value for value in found.values() if isinstance(value, Task)]:
        given = {one for one in inspect.signature(task).parameters if one not in {"self", "session"}}
        if given <= VALUES.keys():
            with reset():
                task.apply(kwargs={one: VALUES[one] for one in given}).get()
    for db in [value for value in found.values() if isinstance(value, Alchemy)]:
        db.stop()


@contextlib.contextmanager
def reset() -> Any:
    """Let each task find the user ada, whatever the one before it has done."""
    yield
    engine = create_engine("sqlite:///shop.sqlite3")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM users"))
        connection.execute(text("INSERT INTO users (id, name) VALUES (1, 'ada')"))
    engine.dispose()


def run_in_child(folder: Path, name: str, code: str) -> str | None:
    """Return what a page has said that failed."""
    log = folder.with_suffix(".log")
    if not (child := os.fork()):
        code_of_exit = 1
        try:
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "\nEventlet is deprecated")
            with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                prepare(folder)
                run(name, code)
            code_of_exit = 0
        except BaseException:
            log.write_text(log.read_text() + traceback.format_exc())
        finally:
            os._exit(code_of_exit)
    return log.read_text() if os.waitpid(child, 0)[1] else None


def main() -> None:
    assert celery_alchemy.Alchemy  # imported before the first fork, like all that is slow
    folder = Path(json.loads(sys.argv[1])["folder"])
    for number, line in enumerate(sys.stdin):
        page = json.loads(line)
        print(json.dumps(run_in_child(folder / str(number), page["page"], page["code"])), flush=True)


if __name__ == "__main__":
    main()
