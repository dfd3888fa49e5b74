"""Runs a small project under a real worker, and tells what went wrong."""

import base64
import json
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery import Celery

from celery_alchemy.loadtests.services.harness import worker_command
from support import preloaded
from support.databases import PostgreSQL
from support.worker import TESTS, Site, stop_process

TASKS = 20
CONCURRENCY = {"prefork": 4, "threads": 8}
START_S, END_S = 30, 25
FILES = {
    "app.py": """
from celery import Celery
from support.hand_written import configure

app = Celery("shop", include=["shop.tasks"])
configure(app)
""",
    "db.py": """
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from support.hand_written import URL

engine = create_engine(URL)
SessionLocal = sessionmaker(bind=engine)
""",
    "models.py": """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows_"
    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column("key_")
    note: Mapped[str]
""",
    "sent.py": """
from support.hand_written import CHECKS
from .app import app


@app.task(name="check", queue=CHECKS)
def check(key, n):
    raise AssertionError("looked at by the test")
""",
}

DOCS_EXAMPLE: dict[str, Any] = {
    "tasks": """
from sqlalchemy.exc import OperationalError
from .app import app
from .db import SessionLocal, User


@app.task(bind=True, max_retries=3)
def create(self, name):
    db = SessionLocal()
    try:
        if db.query(User).filter_by(name=name).first():
            return "exists"
        db.add(User(name=name))
        db.flush()
        welcome.delay(name)
        db.commit()
    except OperationalError as error:
        db.rollback()
        raise self.retry(exc=error)
    finally:
        db.close()


@app.task
def welcome(name):
    with SessionLocal() as db:
        return db.query(User).filter_by(name=name).one().id
""",
    "files": {
        "db.py": FILES["db.py"] + "\n\nclass User: ...\n",
        "web.py": "from .db import SessionLocal\n\n\ndef view():\n    return SessionLocal()\n",
    },
}


@dataclass(frozen=True)
class Shape:
    """A small project, and what is to become of it."""

    name: str
    tasks: str
    """Its tasks.py: a task `work(key, n)` that commits one row "done n", whose end `fate` decides."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Other files of its package, instead of those above or beside them."""
    wrong: tuple[str, ...] = ()
    """Worker pools under which it is wrong as it stands; with "?": sometimes."""
    written: tuple[str, ...] = ()
    """What its files hold afterwards."""
    gone: tuple[str, ...] = ()
    """What its files hold before, and not afterwards."""
    refused: tuple[str, ...] = ()
    """What is said of the tasks that stay as they are, one for each."""
    unchanged: bool = False
    """Nothing is rewritten."""
    rows: tuple[str, ...] = ("done {n}",)
    """The notes of the rows that a good task commits; after "|", the numbers (modulo 5) that have none, or "tries"."""
    runs: bool = True
    """It can be run."""

    def expected(self) -> list[str]:
        """Return the notes of all rows that the tasks are to leave."""
        found = []
        for note, _, but in (row.partition("|") for row in self.rows):
            without = {int(word) for word in but.split() if word.isdigit()} | {3}
            if but == "tries":  # also of those that failed, and of each attempt
                found += [note.format(n=n) for n in range(TASKS) for _ in range(2 if n % 5 == 4 else 1)]
                continue
            found += [note.format(n=n) for n in range(TASKS) if n % 5 not in without]
        return found

    def __str__(self) -> str:
        return self.name


def write(shape: Shape, folder: Path) -> Path:
    """Write the project into a folder; return the folder of its package."""
    package = folder / "shop"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for name, text in {"__init__.py": "", **FILES, "tasks.py": shape.tasks, **shape.files}.items():
        (package / name).write_text(text.lstrip("\n"))
    return package


def texts(package: Path) -> dict[str, str]:
    """Return the text of each file."""
    return {path.name: path.read_text() for path in sorted(package.glob("*.py"))}


@dataclass(frozen=True)
class Run:
    """One worker, with one project."""

    site: Site
    database: PostgreSQL
    folder: Path
    pool: str
    shape: Shape

    def look(self) -> list[str]:
        """Run the tasks; return what was wrong: rows, states, messages, open transactions."""
        name = f"{self.site.prefix[:-1]}-{uuid.uuid4().hex[:8]}"
        config = self._config(name)
        command = worker_command(
            "shop.app", "-P", self.pool, "-c", str(CONCURRENCY[self.pool]), "-Q", name, hostname=f"{name}@here"
        )
        environment = {"PYTHONPATH": str(TESTS), "HAND_WRITTEN": json.dumps(config), "PATH": "/usr/bin:/bin"}
        log = self.folder / f"{self.pool}.log"
        process = preloaded.start(command, self.folder, log, environment)
        checks = Checks(self.site, self.database, config["checks"])
        try:
            told = f"{self.site.prefix}told:{name}"
            ready = self.site.redis.blpop([told], timeout=START_S)
            assert ready, f"no worker: {log.read_text()[-3000:]}"
            return self._wrong(name, told, checks)
        finally:
            checks.stop()
            process.send_signal(9) if self._is_stuck(name) else stop_process(process)

    def _config(self, name: str) -> dict[str, Any]:
        return {
            "queue": name,
            "checks": f"{name}-checks",
            "prefix": self.site.prefix,
            "broker_url": self.site.urls.celery,
            "redis_url": self.site.urls.client,
            "database_url": self.database.url(name),
        }

    def _is_stuck(self, name: str) -> bool:
        return bool(self.database.busy(name))

    def _wrong(self, name: str, told: str, checks: "Checks") -> list[str]:
        key = uuid.uuid4().hex
        client = Celery("client", broker=self.site.urls.celery, backend="disabled://", set_as_current=False)
        client.conf.broker_transport_options = {"global_keyprefix": self.site.prefix}
        with client.connection_for_write() as connection:
            ids = {
                n: client.send_task("shop.tasks.work", (key, n), queue=name, connection=connection).id
                for n in range(TASKS)
            }
        states: dict[str, str] = {}
        deadline = time.monotonic() + END_S
        while len(states) < TASKS and time.monotonic() < deadline:
            if popped := self.site.redis.blpop([told], timeout=1):
                task_id, state = popped[1].split(" ")
                states[task_id] = state
        wrong = []
        expected = {n: "ValueError" if n % 5 == 3 else "SUCCESS" for n in ids}
        found = {n: states.get(task_id, "none") for n, task_id in ids.items()}
        if found != expected:
            wrong.append(f"states: { ({n: state for n, state in found.items() if state != expected[n]}) }")
        rows = sorted(self.database.rows(key))
        good = sorted(self.shape.expected())
        if rows != good:
            wrong.append(f"rows: missing {sorted(set(good) - set(rows))}, too many {sorted(set(rows) - set(good))}")
        if early := checks.early():
            wrong.append(f"sent: {early} messages that ran before their row was there")
        if self._stays_open(name):
            wrong.append(f"open: {self.database.busy(name)}")
        return wrong

    def _stays_open(self, name: str) -> bool:
        """Tell whether a transaction is open a second after the last task has ended."""
        deadline = time.monotonic() + 1
        while self.database.busy(name):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.05)
        return False


class Checks:
    """Runs each message that a task sends, at once: is its row there?"""

    def __init__(self, site: Site, database: PostgreSQL, queue: str) -> None:
        self._site, self._database, self._key = site, database, f"{site.prefix}{queue}"
        self._early: list[int] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def early(self) -> int:
        """Return how many ran before their row could be seen."""
        time.sleep(0.1)
        return len(self._early)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            popped = self._site.redis.brpop([self._key], timeout=0.2)
            if popped:
                (key, n), _, _ = json.loads(base64.b64decode(json.loads(popped[1])["body"]))
                if f"done {n}" not in self._database.rows(key):
                    self._early.append(n)
