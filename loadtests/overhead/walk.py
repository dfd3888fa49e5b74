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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import click
from rich.console import Console

import celery_alchemy

from .child import Sides
from .processes import database, started
from .rows import WITH_LAYER, make_side

WARM_UP_RUNS = 5
RUNS = 30  # beside other processes, one run after the other may be the slowest so far, which is noted
#: The rooms that are counted: loadtests are on the other side.
ROOMS = ("strategies", "workers")
_ROOTS = {room: (Path(celery_alchemy.__file__).parent / room).resolve() for room in ROOMS}
POOLS = ("solo", "threads", "prefork")  # Under gevent the fork is gevent's
#: The scenes that are one request, and their tasks.
REQUESTS = {"one SELECT": "select", "one SELECT, one delay_on_commit": "select_and_delay"}
TARGETS = dict(zip(REQUESTS, ("at most 9 files, 26 calls, 26 crossings, 18 back", "at most 14 files"), strict=True))


class Step(NamedTuple):
    """One call of a function of ours, or the return from it."""

    enters: bool
    frame: int
    file: str  # Relative to the package
    function: str
    pid: int


Scenes = dict[str, list[Step]]  # What is walked through once, by name


class Walk(NamedTuple):
    """What a reader goes through who follows a recording, calls and returns."""

    files: int
    calls: int
    crossings: int
    back: int  # Of the crossings: into a file entered before


@contextmanager
def recorded() -> Iterator[list[Step]]:
    """Note each call of a function of ours in this thread, and each return, during the block."""
    steps: list[Step] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event in {"call", "return"} and (file := _file_of(frame.f_code)):
            # Not the frame itself: it would keep alive what the request frees.
            steps.append(Step(event == "call", id(frame), file, frame.f_code.co_qualname, os.getpid()))

    sys.setprofile(note)
    try:
        yield steps
    finally:
        sys.setprofile(None)


@cache
def _file_of(code: CodeType) -> str:
    """Return where the code of a function of ours stands; empty for bodies of modules and classes, which run once."""
    path = Path(code.co_filename).resolve()
    for room, root in _ROOTS.items():
        if code.co_flags & inspect.CO_OPTIMIZED and path.is_relative_to(root):
            return f"{room}/{path.relative_to(root)}"
    return ""


def measure(recorded: Sequence[Sequence[Any]]) -> Walk:
    """Count what a reader walks who follows the steps, also if they come as JSON.

    Raises:
        ValueError: There are none, so that the recording has missed them.
    """
    steps = [Step(*values) for values in recorded]
    if not steps:
        raise ValueError(f"Nothing of {' and '.join(ROOMS)} was called.")
    open_: list[Step] = []
    path: list[str] = []  # The files that are crossed to, in their order
    for step in steps:
        if step.enters:
            open_.append(step)
        elif open_ and open_[-1].frame == step.frame:
            open_.pop()
        if open_ and path[-1:] != [open_[-1].file]:
            path.append(open_[-1].file)
    files, crossings = len(set(path)), len(path) - 1
    return Walk(files, sum(step.enters for step in steps), crossings, crossings + 1 - files)


def record(run: Callable[[], object]) -> list[Step]:
    """Run a few times, then note it; of several runs the shortest, for in some a record is broken and noted."""
    for _ in range(WARM_UP_RUNS):
        run()
    found = []
    for _ in range(RUNS):
        with recorded() as steps:
            run()
        found.append(steps)
    return min(found, key=len)


def record_start(url: str, pool: str, strategy: str) -> list[Step]:
    """Record a worker's start: all that Celery asks of us until the worker is ready to run, and nothing is run."""
    for _ in range(2):  # the first warms up
        side = make_side(WITH_LAYER, url, strategy)
        with recorded() as steps:
            side.app.WorkController(pool=pool, concurrency=1)
        side.close()
    return steps


def record_fork() -> list[Step]:
    """Record what happens in the child of a fork of this process, whose connection pool holds a connection."""
    for _ in range(2):  # the first warms up
        reading, writing = os.pipe()
        with recorded() as steps:
            pid = os.fork()
        if pid == 0:
            with os.fdopen(writing, "w") as pipe:
                json.dump([step for step in steps if step.pid == os.getpid()], pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            found = [Step(*values) for values in json.load(pipe)]
        os.waitpid(pid, 0)
    return found


def record_requests(sides: Sides) -> Scenes:
    """Record the requests, of the one side, whose worker has started."""
    (side,) = sides.values()
    gc.disable()  # what it finds runs weakref callbacks, some of them ours
    return {name: record(side.tasks[task]) for name, task in REQUESTS.items()}


def record_scenes(sides: Sides, url: str, pool: str, strategy: str) -> Scenes:
    """Record everything that is walked through."""
    requests = record_requests(sides)
    return requests | {"a fork, in the child": record_fork(), "a worker's start": record_start(url, pool, strategy)}


def print_list(console: Console, name: str, steps: list[Step]) -> None:
    """Print the calls of a scene in their order, each below its caller."""
    console.print(f"\n{name}", style="bold")
    depth = 0
    entered: dict[str, None] = {}
    for step in steps:
        if step.enters:
            new = " " if step.file in entered else "*"
            entered[step.file] = None
            console.print(f"{new} {step.file:<34} {'  ' * depth}{step.function}", markup=False, highlight=False)
        depth = max(0, depth + (1 if step.enters else -1))
    console.print(f"Files in the order they are entered: {', '.join(entered)}", highlight=False)


@click.command(help=__doc__)
@click.option("--url", default=None, help="Database; default: DATABASE_URL, else an embedded PostgreSQL.")
@click.option("--strategy", default="auto", show_default=True, help="Session strategy.")
@click.option("--pool", default="solo", show_default=True, type=click.Choice(POOLS), help="The worker pool to act as.")
@click.option("--list", "listed", is_flag=True, help="Print the calls in their order; * marks a file not seen before.")
def main(url: str | None, strategy: str, pool: str, listed: bool) -> None:
    """Record the scenes and print what they are to a reader."""
    from ..bench.runs import console_of_run
    from ..reports.tables import table
    from ..reports.terminal import print_table

    with database(url) as address, started(pool, strategy, address, WITH_LAYER) as process:
        answer = process.call(record_scenes, address, pool, strategy)
    scenes = {name: [Step(*values) for values in steps] for name, steps in answer.items()}
    walks = {name: measure(steps) for name, steps in scenes.items()}
    console = console_of_run()
    lines = [[name, *map(str, numbers), TARGETS.get(name, "")] for name, numbers in walks.items()]
    columns = " | ".join(["scene", *Walk._fields, "target"])
    print_table(console, *table("Our files on the way of one request", columns, lines))
    if listed:
        for name, steps in scenes.items():
            print_list(console, name, steps)


if __name__ == "__main__":
    main()
