"""Latency distributions as standard histogram files (`.hgrm`), which HdrHistogram's plotter and others read."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..bench.results import TASKS_DIRECTORY
from ..bench.rows import TaskRow, nearest_rank, read_rows
from .summary import SweepSummary

TICKS_PER_HALF = 5  # Lines for each halving of what is left to 100 %: 50 %, 60 % ... 75 %, 80 %


def hgrm(values_ms: Iterable[float]) -> str:
    """Return values as a percentile distribution; exact, for it is made of the values and not of buckets.

    Raises:
        ValueError: There are no values.
    """
    ordered = sorted(values_ms)
    if not ordered:
        raise ValueError("there is no histogram of no values")
    shares, left = list[float](), 1.0
    while left > 1 / len(ordered):
        shares += (1 - left + left / 2 * tick / TICKS_PER_HALF for tick in range(TICKS_PER_HALF))
        left /= 2
    lines = ["       Value     Percentile TotalCount 1/(1-Percentile)", ""]
    for share in shares:
        value = nearest_rank(ordered, share * 100)
        below = bisect_right(ordered, value)
        lines.append(f"{value:12.3f} {share:2.12f} {below:10d} {1 / (1 - share):14.2f}")
    mean, deviation = statistics.fmean(ordered), statistics.pstdev(ordered)
    lines += [
        f"{ordered[-1]:12.3f} {1:2.12f} {len(ordered):10d}",
        f"#[Mean    = {mean:12.3f}, StdDeviation   = {deviation:12.3f}]",
        f"#[Max     = {ordered[-1]:12.3f}, Total count    = {len(ordered):12d}]",
        f"#[Buckets = {1:12d}, SubBuckets     = {len(ordered):12d}]",
    ]
    return "\n".join(lines) + "\n"


def write_histograms(directory: Path, sweeps: Sequence[SweepSummary]) -> list[Path]:
    """Write two files for each arm under open load, and return their paths: none without the raw rows.

    Both are of the highest rate that met the objective: latency from when a task was due (`corrected`), and from when
    it was sent (`uncorrected`).
    """
    written = []
    for one in sweeps:
        rows: list[TaskRow] = []
        for step in (step for step in one.kept if step):
            path = directory / TASKS_DIRECTORY / f"sweep-{step.workload}-{step.arm.name}-{step.sweep}.csv.gz"
            if path.exists():
                rows += (row for row in read_rows(path) if row.slice == step.slice and row.succeeded)
        for name, values in (
            ("corrected", [row.latency_ms for row in rows]),
            ("uncorrected", [row.latency_ms - row.send_lag_ms for row in rows]),
        ):
            if values:
                path = directory / f"{one.workload}-{one.arm.name}.{name}.hgrm"
                path.write_text(hgrm(values))
                written.append(path)
    return written
