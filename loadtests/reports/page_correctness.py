"""The part of the page that says what was right, and what broke how."""

from __future__ import annotations

from collections.abc import Sequence

from ..patterns import OURS
from .markup import Content, Text, bullets, folded, paragraph, styled, table, with_note
from .summary import BLOCKED, BROKEN, ContestSummary, Row, Summary
from .wording import where


def correctness(summary: Summary) -> str:
    contests = [contest for contest in summary.contests if contest.kind == "patterns"]
    parts = []
    if contests:
        parts.append(_verdict_matrix(contests))
    else:
        parts.append(paragraph("No contest between patterns was run."))
    pools = [contest for contest in summary.contests if contest.kind == "pools"]
    broken = [(contest, row) for contest in pools for row in contest.rows if row.broken]
    total = sum(len(contest.rows) for contest in pools)
    if broken:
        parts.append(
            table(
                f"Broken in the contests between worker pools: {len(broken)} of {total}",
                ("worker pool", "workload", "what did not hold"),
                [(where(row.arm), contest.workload, _breach_text(row)) for contest, row in broken],
            )
        )
    elif pools:
        parts.append(paragraph(f"In the contests between worker pools every invariant held, in all {total} of them."))
    sweeps = [sweep for sweep in summary.sweeps if sweep.breaches]
    if sweeps:
        parts.append(
            bullets(
                f"Sweep of {where(sweep.arm)}, {sweep.workload}: {sweep.breaches[0].name}: no. "
                f"{sweep.breaches[0].detail}"
                for sweep in sweeps
            )
        )
    unchecked = list(
        dict.fromkeys(text for contest in summary.contests for row in contest.rows for text in row.unchecked)
    )
    if unchecked:
        parts += [paragraph("What could not be checked:"), bullets(unchecked)]
    return "".join(parts)


def _verdict_matrix(contests: Sequence[ContestSummary]) -> str:
    pools = list(dict.fromkeys(contest.pool for contest in contests))
    workloads = list(dict.fromkeys(contest.workload for contest in contests))
    by_label: dict[str, dict[tuple[str, str], Row]] = {}
    for contest in contests:
        for row in contest.rows:
            if not row.arm.copy:
                by_label.setdefault(row.arm.label, {})[contest.pool, contest.workload] = row
    by_label = dict(sorted(by_label.items(), key=lambda item: not item[0].startswith(OURS)))
    overview = table(
        "Worker pool and pattern, over all workloads",
        ("pattern", *pools),
        [
            (label, *(_matrix_cell([cell for (where_, _), cell in found.items() if where_ == pool]) for pool in pools))
            for label, found in by_label.items()
        ],
    )
    details = "".join(
        folded(
            f"{workload}: {_broken_words(contests, workload)}",
            table(
                f"{workload}: worker pool and pattern",
                ("pattern", *pools),
                [
                    (label, *(_matrix_cell([one] if (one := found.get((pool, workload))) else []) for pool in pools))
                    for label, found in by_label.items()
                ],
            ),
        )
        for workload in workloads
    )
    key = (
        "ok: every invariant held. -: not run, because it is what auto takes there anyway, or the pattern is "
        "nothing of its own under that worker pool, or it was not asked for."
    )
    if any(row.blocked for found in by_label.values() for row in found.values()):
        key += (
            f" {BLOCKED}: while one greenlet waits for the server no other runs, so no load was run. That is the "
            "driver's doing and not the pattern's; with a cooperative driver it can be compared."
        )
    return paragraph(key, "small muted") + overview + details


def _broken_words(contests: Sequence[ContestSummary], workload: str) -> str:
    rows = [row for one in contests if one.workload == workload for row in one.rows if not row.arm.copy]
    broken, blocked = sum(row.broken and not row.blocked for row in rows), sum(row.blocked for row in rows)
    words = [f"{broken} of {len(rows)} broken"] if broken else []
    words += [f"in {blocked} the driver blocks"] if blocked else []
    return ", ".join(words) or f"all {len(rows)} ok"


def _matrix_cell(rows: Sequence[Row]) -> Content:
    if not rows:
        return "-"
    broken = [row for row in rows if row.broken]
    if not broken:
        return styled("ok", "ok")
    names = list(dict.fromkeys(breach.name for row in broken for breach in row.breaches))
    word = BLOCKED if all(row.blocked for row in broken) else BROKEN
    head = word if len(rows) == 1 else f"{word} in {len(broken)} of {len(rows)}"
    details = [broken[0].breaches[0].detail] if len(rows) == 1 else []
    return with_note(styled("broken", head), *(f"{name}: no" for name in names), *details)


def _breach_text(row: Row) -> Text:
    notes = [f"{breach.detail}" for breach in row.breaches[:1]]
    return with_note(styled("broken", "; ".join(f"{breach.name}: no" for breach in row.breaches)), *notes)
