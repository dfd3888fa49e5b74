"""The parts of the page about what a worker uses, where its time goes, and what failed."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from . import charts
from .markup import ChartNames, Content, folded, paragraph, scroll, table
from .summary import ContestSummary, Row, Summary
from .wording import count, number, where

LOG_LINES = 15


def _compared(summary: Summary) -> list[ContestSummary]:
    """Return the contests between worker pools; without them, those between patterns."""
    pools = [contest for contest in summary.contests if contest.kind == "pools"]
    return pools or [contest for contest in summary.contests if contest.kind == "patterns"]


def connections(summary: Summary, names: ChartNames) -> str:
    chart = charts.connections(_compared(summary), names.next())
    if not chart:
        return paragraph(
            "No connections were seen: none of the arms is right, or the database server is not ours to see."
        )
    return paragraph(
        "The most connections that were open at one time, as the database server saw them, over all workloads; the "
        "most "
        "that the worker promised when it started; and its concurrency."
    ) + scroll(chart, "Connections against concurrency")


def memory(summary: Summary, names: ChartNames) -> str:
    chart = charts.memory(_compared(summary), names.next())
    if not chart:
        return paragraph("Memory was not measured, or none of the arms is right.")
    return paragraph(
        "Proportional set size: memory that processes share is counted once, in shares. The median over the workloads."
    ) + scroll(chart, "Memory by worker pool")


def phases(summary: Summary, names: ChartNames) -> str:
    contests = [contest for contest in _compared(summary) if any(row.speed for row in contest.rows)]
    drawn = [(contest, chart) for contest in contests if (chart := charts.phases(contest, names.next()))]
    if not drawn:
        return paragraph("Phases were not measured.")
    parts = [
        paragraph(
            "Waiting in the queue, waiting for a connection, in the database driver, and the rest of the run: "
            "medians, put "
            "end to end. Under a closed load the queue is as long as the load generator makes it; compare the others."
        )
    ]
    for place, (contest, chart) in enumerate(drawn):
        title = contest.workload if contest.kind == "pools" else contest.name
        rows: list[list[Content]] = []
        for row in contest.rows:
            if row.speed and row.speed.phases:
                cells: list[Content] = [row.arm.label if contest.kind == "patterns" else where(row.arm)]
                for name in ("queue", "checkout", "database", "run"):
                    one = row.speed.phases.get(name)
                    cells.append(f"{number(one.p50)} / {number(one.p95)}" if one else "-")
                rows.append([*cells, str(max(one.n for one in row.speed.phases.values()))])
        columns = ("arm", "queue", "checkout", "database", "run", "n")
        numbers = folded("In numbers", table("p50 / p95 in ms", columns, rows, range(1, 6)))
        parts.append(folded(title, scroll(chart, f"Phases of {title}") + numbers, place == 0))
    return "".join(parts)


def round_trips(summary: Summary) -> str:
    if not summary.round_trips:
        return paragraph("Round trips were not counted.")
    patterns = list(dict.fromkeys(name for counted in summary.round_trips.values() for name in counted))
    rows = [
        (workload, *(number(counted[name]) if name in counted else "-" for name in patterns))
        for workload, counted in summary.round_trips.items()
    ]
    return paragraph(
        "From worker to database and back, per task, counted by a proxy in between. Exact where rates are noisy."
    ) + table("Round trips per task", ("workload", *patterns), rows, range(1, len(patterns) + 1))


def errors(summary: Summary) -> str:
    rows: list[list[Content]] = [
        [
            contest.name,
            row.arm.label if contest.kind == "patterns" else where(row.arm),
            ", ".join(f"{name}: {n}" for name, n in row.errors.items()),
            str(row.tasks),
        ]
        for contest in summary.contests
        for row in contest.rows
        if row.errors
    ]
    if not rows:
        return paragraph("No task failed that was not meant to.")
    logs = [
        folded(
            f"{contest.name}, {row.arm.pool}, {row.arm.label}: the end of the worker's log", f"<pre>{_tail(row)}</pre>"
        )
        for contest, row in _once([(one, row) for one in summary.contests for row in one.rows if row.log])
    ]
    inner = table("Failures that were not meant", ("contest", "arm", "errors", "of tasks"), rows, (3,))
    more = folded(f"{count(len(logs), 'log')}, one for each worker pool and pattern", "".join(logs)) if logs else ""
    said = paragraph(f"Tasks failed that were not meant to in {count(len(rows), 'arm')}.")
    return said + folded("Which, and how", inner, len(rows) <= 12) + more


def _once(rows: Sequence[tuple[ContestSummary, Row]]) -> Iterator[tuple[ContestSummary, Row]]:
    seen = set()
    for contest, row in rows:
        if (row.arm.pool, row.arm.pattern) not in seen:
            seen.add((row.arm.pool, row.arm.pattern))
            yield contest, row


def _tail(row: Row) -> str:
    return html.escape("\n".join(row.log.splitlines()[-LOG_LINES:]))
