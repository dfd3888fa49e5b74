"""How far a reader walks through our files to follow one request: `make walk`.

Counts, for one task request with one SELECT, for one with a `delay_on_commit` beside it, for a worker's start and for a
fork, what runs of `strategies/` and `workers/`: files entered, calls of our functions, crossings from one of our files
to another (on the way in and on the way back), and crossings back into a file that was entered before. Everything runs
in one thread, and has run a few times before it is counted.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import click
from celery import Celery
from celery.app.trace import build_tracer
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from .. import Alchemy, DatabaseTask, WorkerPool
from .rundir import run_directory
from .services import database_server

WARM_UP_RUNS = 5
RUNS = 5
#: The rooms that are counted: loadtests are on the other side.
ROOMS = ("strategies", "workers")
#: Names of the scenes that are one request.
REQUESTS = ("one SELECT", "one SELECT, one delay_on_commit")


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a function of ours, or the return from it."""

    enters: bool
    frame: int
    file: str
    """Relative to the package."""
    function: str
    pid: int


@dataclass(frozen=True, slots=True)
class Walk:
    """What a reader goes through who follows a recording, calls and returns."""

    files: int
    calls: int
    crossings: int
    back: int
    """Of the crossings: into a file entered before."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Something that is walked through once."""

    name: str
    steps: list[Step]
    target: str


class Recorder:
    """Notes each call of a function of ours in this thread, and each return, while it is entered."""

    def __init__(self) -> None:
        package = Path(__file__).parent.parent
        self._roots = {room: str((package / room).resolve()) + os.sep for room in ROOMS}
        self._known: dict[CodeType, str | None] = {}
        self.steps: list[Step] = []

    def __enter__(self) -> Recorder:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event in {"call", "return"}:
            file = self._file_of(frame.f_code)
            if file is not None:
                # Not the frame itself: it would keep alive what the request frees.
                self.steps.append(Step(event == "call", id(frame), file, frame.f_code.co_qualname, os.getpid()))

    def _file_of(self, code: CodeType) -> str | None:
        if code not in self._known:
            self._known[code] = None
            path = str(Path(code.co_filename).resolve())
            for room, root in self._roots.items():
                # Bodies of modules and classes run once, at import.
                if path.startswith(root) and code.co_flags & inspect.CO_OPTIMIZED:
                    self._known[code] = f"{room}/{path.removeprefix(root)}"
        return self._known[code]


def measure(steps: list[Step]) -> Walk:
    """Count what a reader walks who follows `steps`."""
    open_: list[Step] = []
    current: str | None = None
    entered: set[str] = set()
    calls = crossings = back = 0
    for step in steps:
        if step.enters:
            calls += 1
            open_.append(step)
        elif open_ and open_[-1].frame == step.frame:
            open_.pop()
        innermost = open_[-1].file if open_ else current
        if innermost is None:
            continue
        if innermost != current and current is not None:
            crossings += 1
            back += innermost in entered
        current = innermost
        entered.add(innermost)
    return Walk(len(entered), calls, crossings, back)


def record(run: Callable[[], object]) -> list[Step]:
    """Run a few times, then note it; of several runs the shortest, for in some a record is broken and noted."""
    for _ in range(WARM_UP_RUNS):
        run()
    found: list[list[Step]] = []
    for _ in range(RUNS):
        with Recorder() as recorder:
            run()
        found.append(recorder.steps)
    return min(found, key=len)


def make_app(url: str) -> tuple[Celery, Alchemy]:
    """Return an app with tasks to walk through."""
    app = Celery("walk", broker="memory://", set_as_current=False)
    app.conf.update(
        alchemy_database_url=url,
        alchemy_begin_with_first_statement=False,  # "auto" is decided by a measured time
        task_ignore_result=True,
    )
    db = Alchemy(app)

    # Not shared: an app made later in this process has its own.
    @app.task(base=DatabaseTask, shared=False)
    def other() -> None:
        pass

    @app.task(base=DatabaseTask, bind=True, shared=False, name="select")
    def select(self: DatabaseTask) -> None:
        self.db.execute(text("SELECT 1"))

    @app.task(base=DatabaseTask, bind=True, shared=False, name="select_and_delay")
    def select_and_delay(self: DatabaseTask) -> None:
        self.db.execute(text("SELECT 1"))
        other.delay_on_commit()

    app.finalize()
    return app, db


def request(app: Celery, name: str) -> Callable[[], object]:
    """Return a call that runs one request of a task, as a worker does."""
    task = app.tasks[name]
    trace = build_tracer(name, task, app=app)
    message = {"id": "0", "ignore_result": True, "delivery_info": {}}
    return lambda: trace("0", (), {}, message)


def record_start(url: str, pool: str) -> list[Step]:
    """Record a worker's start: all that Celery asks of us until the worker is ready to run, and nothing is run."""
    for warm_up in (True, False):
        app, db = make_app(url)
        with Recorder() as recorder:
            app.WorkController(pool=pool, concurrency=1)
        db.stop()
        if not warm_up:
            return recorder.steps
    raise AssertionError


def record_fork() -> list[Step]:
    """Record what happens in the child of a fork of this process, whose connection pool holds a connection."""
    for warm_up in (True, False):
        reading, writing = os.pipe()
        with Recorder() as recorder:
            pid = os.fork()
        if pid == 0:
            steps = [step for step in recorder.steps if step.pid == os.getpid()]
            with os.fdopen(writing, "w") as pipe:
                json.dump([(step.enters, step.frame, step.file, step.function, step.pid) for step in steps], pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            found = [Step(*values) for values in json.load(pipe)]
        os.waitpid(pid, 0)
        if not warm_up:
            return found
    raise AssertionError


def record_scenes(url: str, pool: str, strategy: str | None) -> list[Scene]:
    """Record everything that is walked through."""
    app, db = make_app(url)
    db.start_worker(WorkerPool(name=pool), strategy)
    scenes = [
        Scene(
            REQUESTS[0],
            record(request(app, "select")),
            "at most 10 files, 45 calls, 40 crossings, 20 back",
        ),
        Scene(REQUESTS[1], record(request(app, "select_and_delay")), "at most 14 files"),
        Scene("a fork, in the child", record_fork(), ""),
    ]
    db.stop()
    scenes.append(Scene("a worker's start", record_start(url, pool), ""))
    return scenes


def print_list(console: Console, scene: Scene) -> None:
    """Print the calls of a scene in their order, each below its caller."""
    console.print(f"\n{scene.name}", style="bold")
    depth = 0
    entered: dict[str, None] = {}
    for step in scene.steps:
        if step.enters:
            new = " " if step.file in entered else "*"
            entered[step.file] = None
            console.print(f"{new} {step.file:<34} {'  ' * depth}{step.function}", markup=False, highlight=False)
        depth = max(0, depth + (1 if step.enters else -1))
    console.print(f"Files in the order they are entered: {', '.join(entered)}", highlight=False)


@click.command(help=__doc__)
@click.option("--url", default=None, help="Database; default: DATABASE_URL, else an embedded PostgreSQL.")
@click.option("--strategy", default="auto", show_default=True, help="Session strategy.")
@click.option("--pool", default="solo", show_default=True, help="The worker pool to act as.")
@click.option("--list", "listed", is_flag=True, help="Print the calls in their order; * marks a file not seen before.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def main(url: str | None, strategy: str, pool: str, listed: bool, as_json: bool) -> None:
    """Record the scenes and print what they are to a reader."""
    with ExitStack() as stack:
        if url is None:
            run = stack.enter_context(run_directory())
            server = stack.enter_context(database_server(run, os.environ.get("DATABASE_URL")))
            url = stack.enter_context(server.fresh_database(run, "walk")).render_as_string(hide_password=False)
        gc.disable()  # what it finds runs weakref callbacks, some of them ours
        scenes = record_scenes(url, pool, strategy)
    walks = [(scene, measure(scene.steps)) for scene in scenes]
    if as_json:
        click.echo(json.dumps({s.name: [w.files, w.calls, w.crossings, w.back] for s, w in walks}))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="Our files on the way of one request")
    for heading in ("", "files", "calls", "crossings", "back", "target"):
        table.add_column(heading, justify="right" if heading in {"files", "calls", "crossings", "back"} else "left")
    for scene, walk in walks:
        table.add_row(scene.name, str(walk.files), str(walk.calls), str(walk.crossings), str(walk.back), scene.target)
    console.print(table)
    if listed:
        for scene in scenes:
            print_list(console, scene)


if __name__ == "__main__":
    main()
