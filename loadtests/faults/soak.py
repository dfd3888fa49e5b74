"""Many short tasks: does anything grow? Memory, Sessions, connections, objects, sampled all along."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from rich.progress import Progress

from ..bench import arguments
from ..bench.runs import console_of_run
from ..reports import tables
from ..reports.tables import Table
from ..reports.terminal import print_table
from ..services.harness import Services, services
from ..services.sampler import memory_bytes
from ..tasks.patterns import pattern_for
from ..tasks.workloads import WORKLOADS, Workload
from .place import Place, place
from .tasks import COUNT, IGNORE, OBJECTS, RETRY, SESSIONS

TASKS = 200_000
SAMPLES = 40
AHEAD = 500  # How many tasks wait in the queue at most: enough that the worker never waits, few enough to stop in time
COUNTS = 4
STALLED_S = 60.0
CYCLE: tuple[Workload, ...] = (*[WORKLOADS["insert"]] * 5, *[WORKLOADS["select"]] * 3, RETRY, IGNORE)
WARM = 0.25  # The part of the run in which caches fill, and no slope is taken
# A slope above one of these fails the run: 20 MB in 200,000 tasks, or one object left by half of the tasks that retry.
MOST_PER_TASK = {"memory_bytes": 100.0, "objects": 0.05}


@dataclass(frozen=True, slots=True)
class Sample:
    """The worker after so many tasks."""

    tasks: int
    memory_bytes: int  # PSS of all its processes
    connections: int  # As the server lists them
    sessions: int  # Session objects alive in the process that has most of them, the counting task's own among them
    objects: int  # Objects that the garbage collector knows in that process, after a collection


@dataclass(frozen=True, slots=True)
class Soak:
    """What came of one worker pool."""

    pool: str
    tasks: int
    seconds: float
    failed: int
    samples: list[Sample]

    def slope(self, field: str) -> tuple[float, float]:
        """Return the least-squares slope of a field per task, after warming up, and its standard error."""
        settled = [sample for sample in self.samples if sample.tasks >= WARM * self.tasks]
        values = [float(getattr(sample, field)) for sample in settled]
        line, covariance = np.polyfit([sample.tasks for sample in settled], values, 1, cov=True)
        return float(line[0]), float(covariance[0, 0]) ** 0.5

    @property
    def grows(self) -> list[str]:
        """What grows: names of fields; empty if nothing does."""
        grown = []
        for name in ("connections", "sessions"):
            most = {False: 0, True: 0}  # of the first half, and of the second
            for sample in self.samples:
                late = sample.tasks > self.tasks / 2
                most[late] = max(most[late], getattr(sample, name))
            grown += [name] if most[True] > most[False] else []
        for name, allowed in MOST_PER_TASK.items():
            slope, error = self.slope(name)
            grown += [name] if slope - 2 * error > allowed else []
        return grown


def soak(
    services: Services, pool: str, strategy: str, sample_at: Iterable[int], sampled: Callable[[Soak], object]
) -> Soak:
    """Send short tasks to one worker, and sample it after so many.

    Args:
        sampled: Called after each sample with what came of it so far.
    Raises:
        WorkerError: It ended, or was not ready in time.
        RuntimeError: It stands still.
    """
    started = time.monotonic()
    with place(services, pool, pattern_for(pool), strategy, proxied=False) as here:
        samples, failed, sent = [], 0, 0
        for upto in sample_at:
            for number in range(sent, upto):
                here.send_unwatched(CYCLE[number % len(CYCLE)])
                if number % 100 == 0:
                    failed += _keep_up(here)
            sent = upto
            failed += _keep_up(here, waiting=0)
            samples.append(_sample(here, sent))
            so_far = Soak(pool, sent, round(time.monotonic() - started, 1), failed, samples)
            sampled(so_far)
        return so_far


def _keep_up(here: Place, waiting: int = AHEAD) -> int:
    """Wait until at most `waiting` tasks are in the queue; return how many have failed meanwhile."""
    failed, least, deadline = 0, sys.maxsize, 0.0
    while True:
        failed += here.drain()
        left = here.waiting()
        if left <= waiting:
            return failed
        if left < least:
            deadline, least = time.monotonic() + STALLED_S, left
        if time.monotonic() > deadline:
            raise RuntimeError(f"the worker stands still, {left} tasks before it")
        time.sleep(0.02)


def _sample(here: Place, sent: int) -> Sample:
    for _ in range(COUNTS):
        here.run_all(COUNT, 1)  # one at a time: tasks beside it have Sessions, too
    counts = here.counts()
    return Sample(sent, memory_bytes(here.pid), len(here.sessions()), counts[SESSIONS], counts[OBJECTS])


def kept(folder: Path) -> Table:
    """Return what a document says of the soak that is committed in `folder`."""
    rows = json.loads((folder / "soak.json").read_text())
    found = (Soak(**{**one, "samples": [Sample(**sample) for sample in one["samples"]]}) for one in rows)
    return table(found).only("memory, MB", "slope, bytes a task", "Sessions", "connections", "failed")


def table(found: Iterable[Soak]) -> Table:
    """Return the summary."""
    rows = []
    for one in found:
        first, last = one.samples[0], one.samples[-1]
        slope, error = one.slope("memory_bytes")
        objects, objects_error = one.slope("objects")
        rows.append([
            one.pool, f"{first.memory_bytes / 1e6:.0f} → {last.memory_bytes / 1e6:.0f}",
            f"{slope:.0f} ± {2 * error:.0f}", str(last.sessions), str(last.connections), str(one.failed),
            f"{one.tasks:,}", f"{one.tasks / one.seconds:.0f}", f"{objects * 1000:.1f} ± {2000 * objects_error:.1f}",
            ", ".join(one.grows) or "nothing",
        ])  # fmt: skip
    columns = "worker pool | memory, MB | slope, bytes a task | Sessions | connections | failed"
    more = "tasks | tasks/s | objects/1000 tasks | grows"
    return tables.table("Soak: insert, select, retry and Ignore in turn", f"{columns} | {more}", rows)[0]


@click.command(name="soak")
@arguments.option("--pools", "all", arguments.POOL.several, "Worker pools.")
@click.option("--strategy", default="auto", show_default=True, help="Session strategy.")
@click.option("--tasks", default=TASKS, show_default=True, help="Tasks for each worker pool.")
@click.option("--out", type=click.Path(path_type=Path), help="A file for the samples, as JSON.")
@arguments.DATABASE_URL
@arguments.BROKER_URL
def command(
    pools: list[str], strategy: str, tasks: int, out: Path | None, database_url: str | None, broker_url: str | None
) -> None:
    """Run many short tasks, and see whether memory, objects, Sessions or connections grow.

    Exits with 1 if something does, or if a task failed.
    """
    console = console_of_run()
    found: list[Soak] = []
    step = max(tasks // SAMPLES, 1)
    with services(database_url, broker_url) as the_services, Progress(console=console) as progress:
        for pool in pools:
            sample_at = progress.track([*range(step, tasks, step), tasks], description=pool)

            def write(so_far: Soak, before: tuple[Soak, ...] = tuple(found)) -> None:
                if out is not None:  # after each sample, for a long run may be ended
                    out.write_text(json.dumps([asdict(one) for one in (*before, so_far)], indent=1) + "\n")

            found.append(soak(the_services, pool, "" if strategy == "auto" else strategy, sample_at, write))
    print_table(console, table(found))
    if any(one.grows or one.failed for one in found):
        sys.exit(1)
