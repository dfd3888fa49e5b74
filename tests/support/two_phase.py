"""Units of work over two databases, and processes that die in the middle of one."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from celery_alchemy import Alchemy
from celery_alchemy.strategies.several import in_doubt
from support import everywhere, preloaded
from support.apps import Isolated
from support.databases import Database, PostgreSQL
from support.project.models import Child, Row
from support.worker import TESTS

STEPS = 4


def steps(pair: tuple[Database, Database], first: str, other: str) -> list[str]:
    """What a unit of work does that has used `first` first: PostgreSQL decides by its COMMIT, MariaDB by PREPARE."""
    decider = pair[0] if first == "default" else pair[1]
    if isinstance(decider, PostgreSQL):
        return [f"prepare {first}", f"prepare {other}", f"commit {first}", f"commit {other}"]
    return [f"prepare {other}", f"prepare {first}", f"commit {other}", f"commit {first}"]


def decided_by(pair: tuple[Database, Database], first: str) -> int:
    """The number of the first step that is taken when all is decided."""
    return 4 if isinstance(pair[0] if first == "default" else pair[1], PostgreSQL) else 3


@contextlib.contextmanager
def app_with(first: str, second: str, **more: Any) -> Iterator[Alchemy]:
    app = Isolated("two", broker="memory://", set_as_current=False)
    more = everywhere.SETTINGS | more
    app.conf.update(alchemy_database_url=first, alchemy_databases={"reports": second}, alchemy_two_phase=True, **more)
    db = Alchemy(app)
    try:
        yield db
    finally:
        for one in db.databases.values():
            one.stop()


def write_both(db: Alchemy, key: str, *, fails: str = "") -> None:
    with db.unit_of_work() as session:
        for name, used in (("default", session), ("reports", db.databases["reports"].session())):
            used.add(Row(key=key, note="written"))
            used.flush()
            if name == fails:
                used.add(Child(parent_id=-1))


class Host:
    """A process that uses `first` first, writes to both databases, and gets a signal at the step."""

    def __init__(self, folder: Path, urls: list[str], key: str, first: str, step: int, comes: str) -> None:
        script = str(TESTS / "scripts" / "two_phase_host.py")
        self._errors = folder / f"errors-{step}-{comes}"
        command = [sys.executable, script, *urls, key, first, str(step), comes]
        self.process = preloaded.start_talking(command, TESTS, self._errors, {"PYTHONPATH": str(TESTS)})
        assert self.process.stdin is not None
        self.process.stdin.close()

    def line(self) -> str:
        """Return what it says next, "" when it has ended."""
        assert self.process.stdout is not None
        return str(self.process.stdout.readline().decode())

    def rest(self) -> tuple[str, str]:
        """Let it come to its end; return what it has said since, and its errors."""
        assert self.process.stdout is not None
        with self.process.stdout as said:
            found = said.read().decode()
        self.process.wait(60)
        return found, self._errors.read_text()


def commit_and_die(folder: Path, urls: list[str], key: str, first: str, step: int) -> tuple[str, str]:
    return Host(folder, urls, key, first, step, "KILL").rest()


def resolve_all(engines: dict[str, Engine]) -> list[in_doubt.InDoubt]:
    """Return what is left."""
    return [one for one in in_doubt.find(engines) if not in_doubt.resolve(engines, one)]


def engines_of(db: Alchemy) -> dict[str, Engine]:
    return {name: one.engine for name, one in db.databases.items()}
