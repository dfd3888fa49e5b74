"""What the layer costs per task, beside the same task written by hand: `make bench-overhead`.

Every round runs each pair of tasks in turn, through Celery's own tracer and in one process, and compares the two as a
ratio; the machine's mood cancels out. Times are wall-clock microseconds per task, the median of the rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import click
from celery import Celery
from celery.app.trace import build_tracer
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, Integer, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from .. import Alchemy, DatabaseTask, WorkerPool
from .rundir import run_directory
from .services import database_server

WARM_UP_TASKS = 300


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "celery_alchemy_overhead"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)


@dataclass(frozen=True, slots=True)
class Pair:
    """One workload: the task by hand and the task with the layer, each run once by a call."""

    name: str
    by_hand: Callable[[], None]
    with_layer: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A pair's times in microseconds per task, one of each per round, in the order of the rounds."""

    name: str
    by_hand_us: list[float]
    with_layer_us: list[float]

    @property
    def added_us(self) -> float:
        """Median over the rounds of what the layer adds, in microseconds per task."""
        return statistics.median(b - a for a, b in zip(self.by_hand_us, self.with_layer_us, strict=True))

    @property
    def ratios(self) -> list[float]:
        return sorted(b / a for a, b in zip(self.by_hand_us, self.with_layer_us, strict=True))


def make_pairs(url: str, strategy: str, worker_pool: str) -> tuple[list[Pair], Engine]:
    """Return the pairs, their tasks on a Celery app of their own, and the Engine of the hand-written ones."""
    app = Celery("overhead", broker="memory://", set_as_current=False)
    app.conf.update(alchemy_database_url=url, task_ignore_result=True)
    db = Alchemy(app)
    # The hand-written tasks have an Engine with the same options, connected once: as a user would write it.
    engine = create_engine(url, pool_size=1, max_overflow=0)

    @app.task
    def nothing_by_hand() -> None:
        pass

    @app.task(base=DatabaseTask)
    def nothing_with_layer() -> None:
        pass

    @app.task
    def select_by_hand() -> None:
        with Session(engine) as session, session.begin():
            session.execute(text("SELECT 1"))

    @app.task(base=DatabaseTask, bind=True)
    def select_with_layer(self: DatabaseTask) -> None:
        self.db.execute(text("SELECT 1"))

    @app.task
    def insert_by_hand() -> None:
        with Session(engine) as session, session.begin():
            session.add(Row())

    @app.task(base=DatabaseTask, bind=True)
    def insert_with_layer(self: DatabaseTask) -> None:
        self.db.add(Row())

    app.finalize()
    Base.metadata.create_all(engine)
    db.start_worker(WorkerPool(name=worker_pool), strategy)
    pairs = [
        Pair("no database", _runner(app, nothing_by_hand), _runner(app, nothing_with_layer)),
        Pair("one SELECT", _runner(app, select_by_hand), _runner(app, select_with_layer)),
        Pair("one INSERT", _runner(app, insert_by_hand), _runner(app, insert_with_layer)),
    ]
    return pairs, engine


def _runner(app: Celery, task: Any) -> Callable[[], None]:
    trace = build_tracer(task.name, task, app=app)
    request = {"id": "0", "ignore_result": True, "delivery_info": {}}

    def run() -> None:
        trace("0", (), {}, request)

    return run


def measure(pair: Pair, rounds: int, tasks_per_slice: int) -> Outcome:
    """Time the two in turn, the order reversed every round."""
    outcome = Outcome(pair.name, [], [])
    for run in (pair.by_hand, pair.with_layer):
        _time_us(run, WARM_UP_TASKS)
    for number in range(rounds):
        sides = [(pair.by_hand, outcome.by_hand_us), (pair.with_layer, outcome.with_layer_us)]
        for run, times in sides if number % 2 else reversed(sides):
            times.append(_time_us(run, tasks_per_slice))
    return outcome


def _time_us(run: Callable[[], None], tasks: int) -> float:
    begin = time.perf_counter()
    for _ in range(tasks):
        run()
    return (time.perf_counter() - begin) / tasks * 1e6


def median_interval(ordered: list[float]) -> tuple[float, float]:
    """Return the 95 % sign-test interval of the median of `ordered` values."""
    count = len(ordered)
    low = max(0, int(count / 2 - 0.98 * count**0.5))
    return ordered[low], ordered[count - 1 - low]


@click.command(help=__doc__)
@click.option("--rounds", default=60, show_default=True, type=click.IntRange(6), help="Rounds per pair.")
@click.option("--tasks", default=100, show_default=True, type=click.IntRange(1), help="Tasks per side and round.")
@click.option("--strategy", default="auto", show_default=True, help="Session strategy.")
@click.option("--pool", default="solo", show_default=True, help="The worker pool to act as.")
def main(rounds: int, tasks: int, strategy: str, pool: str) -> None:
    """Run the rounds and print the table."""
    with ExitStack() as stack:
        run = stack.enter_context(run_directory())
        server = stack.enter_context(database_server(run, os.environ.get("DATABASE_URL")))
        url = stack.enter_context(server.fresh_database(run, "overhead")).render_as_string(hide_password=False)
        pairs, engine = make_pairs(url, strategy, pool)
        try:
            outcomes = [measure(pair, rounds, tasks) for pair in pairs]
        finally:
            Base.metadata.drop_all(engine)
            engine.dispose()
    table = Table(title="Cost of the layer per task, wall-clock, interleaved")
    for heading in ("task", "by hand us", "with layer us", "added us", "ratio", "95 % of the median", "quartiles", "n"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for outcome in outcomes:
        ratios = outcome.ratios
        low, high = median_interval(ratios)
        quartiles = statistics.quantiles(ratios, n=4)
        table.add_row(
            outcome.name,
            f"{statistics.median(outcome.by_hand_us):.1f}",
            f"{statistics.median(outcome.with_layer_us):.1f}",
            f"{outcome.added_us:+.1f}",
            f"{statistics.median(ratios):.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{quartiles[0]:.3f} to {quartiles[2]:.3f}",
            f"{len(ratios)} x {tasks}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "sqlalchemy", "psycopg", "celery-alchemy"))
    console.print(f"Python {platform.python_version()}, {packages}; {os.cpu_count()} processors, {platform.machine()}.")


if __name__ == "__main__":
    main()
