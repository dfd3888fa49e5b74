"""Instructions per task, counted by valgrind's callgrind."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from ..errors import LoadTestError
from . import child
from .processes import started

#: Tasks per slice. The difference of two slices is free of what a slice costs once.
SLICES = (0, 30)
#: Few leave Python's adaptive interpreter with code to adapt, which then is counted.
WARM_UP_TASKS = 40
#: Of Python's hashes, one process for each. Where things lie in memory decides which of Python's caches collide: two
#: percent, and nothing that a task does. The seeds move some things, and not all.
SEEDS = (0, 1, 2)


class Instructions(NamedTuple):
    """Instructions per task, over several processes."""

    median: float
    least: float  # Of the process whose caches collided least: what a gate compares
    spread: float  # The largest value less the smallest, as a share of the median


def is_available() -> bool:
    """Tell whether valgrind is installed."""
    return shutil.which("valgrind") is not None and shutil.which("vgdb") is not None


def count(
    side: str, pool: str, strategy: str, url: str, tasks: list[str], seeds: tuple[int, ...] = SEEDS
) -> dict[str, Instructions]:
    """Return the instructions of each of `tasks`, keys of `Side.tasks`.

    Each runs in processes of its own, for Python adapts its code to what has run before.

    Raises:
        LoadTestError: the process has ended early.
    """
    # Once without valgrind, which finds errors soon and leaves compiled modules. Whether a module was compiled just now
    # or read is seen in the counts.
    with started(pool, strategy, url, side) as process:
        for task in tasks:
            process.call(child.repeat, side, task, 2)
    found = {}
    for task in tasks:
        values = [_count(side, pool, strategy, url, task, seed) for seed in seeds]
        median, least = statistics.median(values), min(values)
        found[task] = Instructions(median, least, (max(values) - least) / median)
    return found


def _count(side: str, pool: str, strategy: str, url: str, task: str, seed: int) -> float:
    """Return the instructions of one task."""
    with tempfile.TemporaryDirectory(prefix="celery-alchemy-counts-") as folder:
        out = Path(folder) / "out"
        # Imports and start are not counted, and without instrumentation they take a tenth of the time.
        valgrind = [
            "valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-before=getsid",
            f"--callgrind-out-file={out}.%p", f"--log-file={folder}/log.%p",
        ]  # fmt: skip
        with started(pool, strategy, url, side, below=valgrind, seed=seed) as process:
            order = ["vgdb", f"--pid={process.pid}", "instrumentation", "on"]
            done = subprocess.run(order, check=False, capture_output=True, text=True)  # noqa: S603
            if done.returncode:
                raise LoadTestError(f"{' '.join(order)} ended with {done.returncode}:\n{done.stderr}")
            process.call(child.repeat, side, task, WARM_UP_TASKS)
            pid = process.call(child.mark_slices, side, task, SLICES)
        # Each slice stands between two marks: what came before the first of them is the odd dump.
        least, most = (_total(Path(f"{out}.{pid}.{2 * number}")) for number in (1, 2))
    return (most - least) / (SLICES[1] - SLICES[0])


def _total(path: Path) -> int:
    found = re.search(r"^totals: (\d+)", path.read_text(), re.MULTILINE)
    assert found is not None, f"{path} has no totals"
    return int(found[1])
