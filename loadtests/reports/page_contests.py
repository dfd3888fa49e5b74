"""The parts of the page that compare session patterns, and worker pools."""

from __future__ import annotations

import html
from collections.abc import Sequence

from . import charts
from .markup import ChartNames, Content, bullets, folded, paragraph, scroll, styled, table, with_note
from .recommendation import Recommendation
from .standings import Standing
from .statistics import METRICS
from .summary import ContestSummary, Row, Summary
from .together import PoolStanding, labels_of
from .wording import (
    count,
    factor,
    grouped_flags,
    interval,
    listed,
    mebibytes,
    name_in,
    number,
    percent,
    pool_ratio,
    where,
)


def patterns(summary: Summary, found: Recommendation, names: ChartNames) -> str:
    contests = [contest for contest in summary.contests if contest.kind == "patterns"]
    if not contests:
        return paragraph("No contest between patterns was run.")
    if not any(row.speed for contest in contests for row in contest.rows):
        return paragraph("Nothing was measured: the patterns were only checked, or all of them are broken.")
    parts = [
        paragraph(
            f"Under each worker pool, all patterns on the same workload. The reference is {_references(contests)}: "
            f"a ratio "
            "above 1 means more of it than the reference. Losses of ours are printed as the wins are."
        ),
        standings_table(found.standings),
        *by_pool_tables(found.by_pool),
    ]
    for pool in dict.fromkeys(contest.pool for contest in contests):
        parts.append(f"<h3>{html.escape(pool)}</h3>")
        own = [contest for contest in contests if contest.pool == pool]
        for contest in own:
            opened = contest is contests[0]
            parts.append(folded(f"{contest.workload}: {_outcome(contest)}", _contest(contest, names), opened))
    return "".join(parts)


def _references(contests: Sequence[ContestSummary]) -> str:
    return listed(dict.fromkeys(row.arm.label for contest in contests if (row := contest.reference))) or "missing"


def standings_table(standings: Sequence[Standing]) -> str:
    """Return how each pattern stands against ours."""

    def tally(standing: Standing, metric: str) -> Content:
        one = standing.tallies[metric]
        if not one.contests:
            return "-"
        words = ("faster", "slower") if metric == "goodput" else ("cheaper", "dearer")
        said = [f"{n} {word}" for n, word in zip((one.better, one.worse), words, strict=True) if n]
        style = "bad" if one.better < one.worse else "good" if one.better else "muted"
        if not said:
            return with_note(styled("muted nowrap", "no difference shown"), f"in {one.neither}")
        return with_note(styled(style, ", ".join(said)), f"no difference shown in {one.neither}" if one.neither else "")

    def middle(standing: Standing, metric: str) -> Content:
        one = standing.tallies[metric]
        if not one.contests:
            return "-"
        return with_note(factor(one.middle), f"{factor(one.least)} to {factor(one.most)}" if one.contests > 1 else "")

    rows: list[Sequence[Content]] = [
        (
            standing.pattern,
            with_note(
                styled("broken" if standing.broken else "ok", f"{standing.broken} of {standing.cells}"),
                listed(standing.broken_under),
                f"driver blocks in {standing.blocked}" if standing.blocked else "",
            ),
            tally(standing, "goodput"),
            middle(standing, "goodput"),
            tally(standing, "cpu"),
            middle(standing, "cpu"),
            middle(standing, "database_cpu"),
        )
        for standing in standings
    ]
    columns = (
        "pattern", "broken", "goodput", "mean ratio (range)", "worker CPU per task", "mean ratio (range)",
        "database CPU per task, mean ratio (range)",
    )  # fmt: skip
    caption = "Each pattern against the reference, over all worker pools and workloads where it is right"
    return table(caption, columns, rows)


def by_pool_tables(standings: Sequence[PoolStanding]) -> list[str]:
    """Return how each pattern stands against ours under each worker pool, a table for each metric."""
    pools = list(dict.fromkeys(one.pool for one in standings))
    cells = {(one.label, one.pool): one for one in standings}

    def cell(label: str, pool: str, metric: str) -> Content:
        found = cells[label, pool].ratios.get(metric) if (label, pool) in cells else None
        if not found:
            return "-"
        good = {"faster": "good", "cheaper": "good", "slower": "bad", "dearer": "bad"}.get(found.verdict, "muted")
        return with_note(styled(good, pool_ratio(found)), f"n = {found.estimate.n}; {found.verdict}", found.reason)

    return [
        table(
            f"Over all workloads of a worker pool, {METRICS[metric].label}: the median of the batches, "
            "with its 95 % interval",
            ("pattern", *pools),
            [[label, *(cell(label, pool, metric) for pool in pools)] for label in labels_of(standings)],
        )
        for metric in dict.fromkeys(name for one in standings for name in one.ratios)
    ]


def _outcome(contest: ContestSummary) -> str:
    rows = [row for row in contest.rows if not row.arm.copy and not row.reference]
    words = []
    for verdict in ("faster", "slower"):
        if n := sum((one := row.ratio("goodput")) is not None and one.verdict == verdict for row in rows):
            words.append(f"{n} {verdict}")
    if level := sum((one := row.ratio("goodput")) is not None and not one.shown for row in rows):
        words.append(f"no difference shown in {level}")
    if broken := sum(row.broken and not row.blocked for row in contest.rows):
        words.append(f"{broken} broken")
    if blocked := sum(row.blocked for row in contest.rows):
        words.append(f"not comparable in {blocked}")
    return ", ".join(words) or "nothing to compare"


def _contest(contest: ContestSummary, names: ChartNames) -> str:
    parts = [paragraph(contest.note, "bad")] if contest.note else []
    chart = charts.forest(contest, names.next())
    if chart:
        parts.append(scroll(chart, f"Forest plot of {contest.name}"))
    else:
        parts.append(paragraph("There is no ratio to draw."))
    parts.append(_contest_table(contest))
    if flags := grouped_flags(contest):
        parts.append(paragraph("Read with care:", "flag") + bullets(flags))
    return "".join(parts)


def _contest_table(contest: ContestSummary) -> str:
    columns = (
        "arm", "goodput /s", "ratio", "goodput is", "worker CPU ms/task", "ratio", "worker CPU is", "database CPU "
        "ms/task",
        "p50 ms", "p95 ms", "p99 ms", "connections: seen / promised", "PSS MiB",
    )  # fmt: skip
    return table(
        f"{contest.name}: {contest.rounds} rounds in {count(contest.batches, 'batch', 'batches')}; A/A floor of "
        f"goodput "
        f"{percent(contest.floors.get('goodput'))}, of worker CPU {percent(contest.floors.get('cpu'))}",
        columns,
        [_contest_row(contest, row) for row in contest.rows],
        (1, 4, 7, 8, 9, 10, 11, 12),
    )


def _contest_row(contest: ContestSummary, row: Row) -> list[Content]:
    name = name_in(contest, row)
    took = f"strategy: {row.strategy}" if row.strategy and row.strategy != row.arm.strategy else ""
    flagged = "flagged" if row.flags else ""
    head = with_note(name, "the reference" if row.reference else "", took, flagged)
    if row.broken:
        said = with_note(styled("broken", row.word), f"{row.breaches[0].name}: no")
        return [head, "-", said, *["-"] * 10]
    if not (speed := row.speed):
        return [head, "-", "not measured", *["-"] * 10]
    latency = speed.latency
    promised = "-" if row.promised_connections is None else row.promised_connections
    return [
        head,
        number(speed.goodput_per_s.median),
        *_ratio_cells(row, "goodput"),
        number(speed.worker_cpu_ms),
        *_ratio_cells(row, "cpu"),
        number(speed.database_cpu_ms),
        *(number(getattr(latency, name)) if latency else "-" for name in ("p50", "p95", "p99")),
        f"{row.peak_connections} / {promised}",
        mebibytes(row.pss_bytes),
    ]


def _ratio_cells(row: Row, metric: str) -> tuple[Content, Content]:
    found = row.ratio(metric)
    if not found:
        return ("1" if row.reference else "-"), "-"
    batches = f"batches: {', '.join(factor(median) for median in found.batches.values())}"
    good = {"faster": "good", "cheaper": "good", "slower": "bad", "dearer": "bad"}.get(found.verdict, "muted nowrap")
    value = with_note(
        f"{factor(found.estimate.median)} {interval(found.estimate)}", f"n = {found.estimate.n}; {batches}"
    )
    return value, with_note(styled(good, found.verdict), found.reason)


def pools(summary: Summary, names: ChartNames) -> str:
    contests = [contest for contest in summary.contests if contest.kind == "pools"]
    if not contests:
        return paragraph("Worker pools were not compared with each other.")
    if not any(row.speed for contest in contests for row in contest.rows):
        return paragraph("Nothing was measured: the worker pools were only checked, or all of them are broken.")
    reference = contests[0].reference
    parts = [
        paragraph(
            "All worker pools and concurrencies, each with celery-alchemy and the strategy auto. The reference is "
            f"{where(reference.arm) if reference else 'missing'}."
        )
    ]
    for contest in contests:
        said = f"{contest.workload}: {_outcome(contest)}"
        parts.append(folded(said, _contest(contest, names), contest is contests[0]))
    return "".join(parts)
