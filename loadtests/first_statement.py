"""What `alchemy_begin_with_first_statement` saves, over a network that delays each round trip by so much.

    python -m celery_alchemy.loadtests.first_statement --delay 1 --delay 20

Each task, by hand and with the layer, each with BEGIN by itself and with BEGIN along with the first statement, runs in
turn with the others, once each, in one process. A round is a number of turns; it compares the medians of its times as
ratios. The delay is that of a proxy in a process of its own; round trips are counted by another proxy.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import click
from celery import Celery
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, create_engine, text
from sqlalchemy.orm import Session

from .. import Alchemy, DatabaseTask, WorkerPool
from ..strategies.features.first_statement import begin_with_first_statement
from ..strategies.options import DatabaseOptions
from .overhead.__main__ import median_interval
from .overhead.rows import Base, Item, run_of
from .proxy import DistantProxy, counting_proxy
from .rundir import run_directory
from .services import database_server

STATEMENTS = 10
WARM_UP_TASKS = 30
ARMS = ("by hand", "by hand, BEGIN along", "with the layer", "with the layer, BEGIN along")
TASKS = ("one INSERT", "ten statements")
Runs = dict[str, dict[str, Callable[[], object]]]


@dataclass(slots=True)
class Outcome:
    """What was measured of one task, by arm."""

    times_ms: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    """Milliseconds per task, the median of each round."""
    round_trips: dict[str, int] = field(default_factory=dict)

    def ratios(self, arm: str) -> list[float]:
        """Return the times of `arm` as parts of those by hand, round by round, sorted."""
        return sorted(a / b for a, b in zip(self.times_ms[arm], self.times_ms["by hand"], strict=True))


def _serve(url: str, delay_s: float, pipe: Connection) -> None:
    from sqlalchemy import make_url

    proxy = DistantProxy(make_url(url), delay_s)
    pipe.send(proxy.port)
    with contextlib.suppress(EOFError):
        pipe.recv()  # until the process that measures needs it no more, or is gone
    proxy.close()


@contextmanager
def distant(database: URL, delay_s: float) -> Iterator[URL]:
    """Give the URL of `database` by way of a proxy in a process of its own, which shares no interpreter lock."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    address = database.render_as_string(hide_password=False)
    process = context.Process(target=_serve, args=(address, delay_s, theirs), daemon=True)
    process.start()
    try:
        port = ours.recv()
        query = {name: value for name, value in database.query.items() if name != "host"}
        yield database.set(host="127.0.0.1", port=port, query=query)
    finally:
        ours.send(None)
        process.join(10)


@contextmanager
def tasks_on(url: URL) -> Iterator[Runs]:
    """Give what runs each task once, by task and arm."""
    address = url.render_as_string(hide_password=False)
    engines = [create_engine(url, pool_size=1, max_overflow=0) for _ in range(2)]
    Base.metadata.create_all(engines[0])
    begin_with_first_statement(engines[1], DatabaseOptions(begin_with_first_statement=True))
    runs: Runs = {name: {} for name in TASKS}
    started = []
    for number, arm in enumerate(ARMS):
        app = Celery(f"first-{number}", broker="memory://", set_as_current=False)
        app.conf.update(alchemy_database_url=address, task_ignore_result=True)
        if arm.startswith("by hand"):
            insert, ten = _by_hand(app, engines[number])
        else:
            app.conf.alchemy_begin_with_first_statement = arm.endswith("along")
            db = Alchemy(app)
            insert, ten = _with_layer(app)
            app.finalize()
            db.start_worker(WorkerPool(name="solo"))
            started.append(db)
        app.finalize()
        runs["one INSERT"][arm], runs["ten statements"][arm] = run_of(app, insert), run_of(app, ten)
    try:
        yield runs
    finally:
        for db in started:
            db.stop()
        for engine in engines:
            engine.dispose()


def _by_hand(app: Celery, engine: Any) -> tuple[Any, Any]:
    @app.task(shared=False)
    def insert() -> None:
        with Session(engine, expire_on_commit=False) as session, session.begin():
            session.add(Item())

    @app.task(shared=False)
    def ten() -> None:
        with Session(engine, expire_on_commit=False) as session, session.begin():
            for number in range(STATEMENTS):
                session.execute(text("SELECT :number"), {"number": number})

    return insert, ten


def _with_layer(app: Celery) -> tuple[Any, Any]:
    @app.task(base=DatabaseTask, bind=True, shared=False)
    def insert(self: DatabaseTask) -> None:
        self.db.add(Item())

    @app.task(base=DatabaseTask, bind=True, shared=False)
    def ten(self: DatabaseTask) -> None:
        for number in range(STATEMENTS):
            self.db.execute(text("SELECT :number"), {"number": number})

    return insert, ten


def measure(database: URL, delay_s: float, rounds: int, turns: int) -> dict[str, Outcome]:
    """Time all arms in turn, and count their round trips.

    Returns:
        By name of the task.
    """
    outcomes = {name: Outcome() for name in TASKS}
    with counting_proxy(database) as proxy, tasks_on(proxy.url) as runs:
        for name, arms in runs.items():
            _round(arms, WARM_UP_TASKS)
            for arm, run in arms.items():
                before = proxy.round_trips
                run()
                outcomes[name].round_trips[arm] = proxy.round_trips - before
    with ExitStack() as stack:
        url = stack.enter_context(distant(database, delay_s)) if delay_s else database
        runs = stack.enter_context(tasks_on(url))
        for name, arms in runs.items():
            _round(arms, WARM_UP_TASKS)
            for _ in range(rounds):
                for arm, median_ms in _round(arms, turns).items():
                    outcomes[name].times_ms[arm].append(median_ms)
    return outcomes


def _round(arms: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return the median time of each arm in milliseconds; the order is reversed every turn."""
    times_ms: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(turns):
        for arm in ARMS if number % 2 else reversed(ARMS):
            began = time.perf_counter()
            arms[arm]()
            times_ms[arm].append((time.perf_counter() - began) * 1000)
    return {arm: statistics.median(times) for arm, times in times_ms.items()}


@click.command(help=__doc__)
@click.option("--delay", "delays", default=(0.0, 1.0), multiple=True, show_default=True, help="Of a round trip, in ms.")
@click.option("--driver", "drivers", default=("psycopg", "psycopg2"), multiple=True, show_default=True)
@click.option("--rounds", default=40, show_default=True, type=click.IntRange(6), help="Rounds per task and delay.")
@click.option("--turns", default=20, show_default=True, type=click.IntRange(1), help="Tasks per arm and round.")
def main(delays: tuple[float, ...], drivers: tuple[str, ...], rounds: int, turns: int) -> None:
    """Run the rounds and print the table."""
    table = Table(title="BEGIN along with the first statement: time per task, wall-clock, interleaved")
    for heading in ("driver", "delay ms", "task", "arm", "round trips", "ms", "/ by hand", "95 %", "quartiles", "n"):
        table.add_column(heading, justify="left" if heading in {"driver", "task", "arm"} else "right")
    with ExitStack() as stack:
        run = stack.enter_context(run_directory())
        server = stack.enter_context(database_server(run, os.environ.get("DATABASE_URL")))
        database = stack.enter_context(server.fresh_database(run, "first_statement"))
        for driver in drivers:
            for delay in delays:
                url = database.set(drivername=f"postgresql+{driver}")
                for name, outcome in measure(url, delay / 1000, rounds, turns).items():
                    for arm in ARMS:
                        table.add_row(driver, f"{delay:g}", name, arm, *_cells(outcome, arm), f"{rounds} x {turns}")
    console = Console(width=150)
    console.print(table)
    names = ("celery", "sqlalchemy", "psycopg", "psycopg2-binary", "celery-alchemy")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    console.print(f"Python {platform.python_version()}, {packages}; {os.cpu_count()} processors, {platform.machine()}.")


def _cells(outcome: Outcome, arm: str) -> list[str]:
    ratios = outcome.ratios(arm)
    low, high = median_interval(ratios)
    quartiles = statistics.quantiles(ratios, n=4)
    return [
        str(outcome.round_trips[arm]),
        f"{statistics.median(outcome.times_ms[arm]):.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{quartiles[0]:.3f} to {quartiles[2]:.3f}",
    ]


if __name__ == "__main__":
    main()
