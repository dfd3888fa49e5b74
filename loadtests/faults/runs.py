"""Cause every fault in every cell, a few cells at a time, and keep what each one cost."""

from __future__ import annotations

import json
import platform
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from ..errors import WorkerError
from ..services.brokers import Broker
from ..services.databases import DatabaseServer
from ..services.rundir import RunDirectory
from ..tasks.patterns import OURS, PATTERNS
from .faults import FAULTS
from .place import Damage, place

PACKAGES = ("celery", "SQLAlchemy", "psycopg", "gevent", "eventlet", "Flask-SQLAlchemy")
STRATEGIES = ("local", "scoped", "per_process")
BASELINES = ("recipe", "with_session", "thread_local", "flask", "tuned")


@dataclass(frozen=True, slots=True)
class Cell:
    """A way to give a task its Session, under a worker pool, and a fault."""

    pool: str
    pattern: str
    strategy: str  # Empty for a pattern written by hand
    fault: str

    @property
    def way(self) -> str:
        """The way's name, for people."""
        return f"{OURS} ({self.strategy})" if self.strategy else self.pattern

    def __str__(self) -> str:
        return f"{self.fault}, {self.pool}, {self.way}"


@dataclass(frozen=True, slots=True)
class Result:
    """What the fault cost there."""

    cell: Cell
    damage: Damage
    failed: str = ""  # Why the cell could not be run, for example that its worker did not start


def cells(pools: Sequence[str], faults: Sequence[str]) -> Iterator[Cell]:
    """Return the cells, the ones of one fault together."""
    for name in faults:
        for pool in pools:
            if pool in FAULTS[name].pools:
                yield from (Cell(pool, way, "", name) for way in BASELINES if pool in PATTERNS[way].pools)
                yield from (Cell(pool, OURS, strategy, name) for strategy in STRATEGIES)


def run_all(
    run: RunDirectory, server: DatabaseServer, broker: Broker, chosen: Sequence[Cell], *, seed: int, side_by_side: int,
    on_result: Callable[[Result], object],
) -> list[Result]:  # fmt: skip
    """Run the cells, `side_by_side` at a time; return their results in the order of the cells."""
    with ThreadPoolExecutor(side_by_side) as executor:
        running = [executor.submit(_run, run, server, broker, cell, seed) for cell in chosen]
        try:
            for done in as_completed(running):
                on_result(done.result())
        finally:
            executor.shutdown(cancel_futures=True)
    return [future.result() for future in running]


def _run(run: RunDirectory, server: DatabaseServer, broker: Broker, cell: Cell, seed: int) -> Result:
    fault = FAULTS[cell.fault]
    try:
        with place(
            run, server, broker, pool=cell.pool, pattern=cell.pattern, strategy=cell.strategy, in_main=fault.in_main
        ) as here:
            fault.cause(here, random.Random(seed))  # noqa: S311 - nothing secret
            return Result(cell, here.damage())
    except WorkerError as error:
        return Result(cell, Damage(), str(error).splitlines()[0])
    except Exception:
        return Result(cell, Damage(), traceback.format_exc().strip())


def write(path: Path, results: Sequence[Result], **about: object) -> None:
    """Write the facts as JSON."""
    versions = {name: version(name) for name in PACKAGES}
    facts = {**about, "python": platform.python_version(), "versions": versions}
    facts["results"] = [asdict(result) for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")
