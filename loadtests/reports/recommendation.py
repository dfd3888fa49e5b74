"""What to use, with the evidence for it, what speaks against it, and how far it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..patterns import OURS
from .automatic import Advice, AutoCheck, auto_check, strategy_advice
from .in_short import in_short
from .standings import Standing, geometric, is_better, is_worse, standing, standings_of
from .statistics import FASTER, SLOWER
from .summary import ContestSummary, Row, Summary, SweepSummary
from .together import PoolStanding, pool_standings
from .wording import count, evidence, factor, listed, mebibytes, number, ratio, where

CHECKOUT_SHARE = 0.1
"""Tasks that wait longer than this share of their run for a connection want a larger connection pool."""
CLOSE = 0.95
"""Means of goodput over workloads that are less apart than this are not told apart: they have no interval."""
BY_LESS = 1.1
"""How much more throughput at the objective an arm must have to be mentioned against the choice."""


@dataclass(frozen=True, slots=True)
class WorkloadAdvice:
    """What to use for one workload."""

    workload: str
    advice: list[Advice]
    wins: list[str]
    losses: list[str]
    """Where what is written by hand is better than ours, and what the choice costs."""
    row: Row | None = None
    """The arm of the contest between worker pools that was chosen."""
    level: int = 0
    """How many other arms it is not shown to be faster than."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Everything that is recommended."""

    in_short: list[str]
    overall: list[Advice]
    workloads: list[WorkloadAdvice]
    automatic: list[AutoCheck]
    standings: list[Standing]
    by_pool: list[PoolStanding]
    """Each pattern under each worker pool, over all workloads."""
    limits: list[str]
    """How far all of it holds."""


def recommend(summary: Summary) -> Recommendation:
    """Return what to use, as far as there is evidence."""
    by_pool = pool_standings(summary)
    automatic = [auto_check(summary, pool, by_pool) for pool in _pools(summary)]
    workloads = [_of_workload(summary, name, automatic) for name in summary.workloads] if summary.measured else []
    standings = standings_of(summary)
    overall = _overall(summary, workloads, automatic)
    choices = {found.workload: found.row.arm for found in workloads if found.row}
    undecided = [found.workload for found in workloads if found.level]
    return Recommendation(
        in_short(summary, overall, choices, undecided, automatic, standings, by_pool),
        overall,
        workloads,
        automatic,
        standings,
        by_pool,
        _limits(summary),
    )


def _pools(summary: Summary) -> list[str]:
    return list(dict.fromkeys(contest.pool for contest in summary.contests if contest.kind == "patterns"))


# Worker pool and concurrency


def _of_workload(summary: Summary, workload: str, automatic: Sequence[AutoCheck]) -> WorkloadAdvice:
    contest = summary.contest(f"pools/{workload}")
    advice: list[Advice] = []
    losses: list[str] = []
    wins: list[str] = []
    chosen = _best(contest) if contest else None
    pool = chosen.arm.pool if chosen else next(
        (found.pool for found in summary.contests if found.kind == "patterns" and found.workload == workload), ""
    )  # fmt: skip
    if contest and chosen:
        advice += [_pool_advice(summary, contest, chosen), _concurrency_advice(contest, chosen)]
        costs = [
            f"{where(chosen.arm)}: {evidence(found)}"
            for name in ("cpu", "database_cpu", "p95")
            if is_worse(found := chosen.ratio(name)) and found
        ]
        losses += costs
    elif contest:
        advice.append(Advice("worker pool", "none", ["No arm of this contest is right and measured."], []))
    else:
        measured = [found.pool for found in summary.contests if found.kind == "patterns" and found.workload == workload]
        if measured:
            why = f"Worker pools were not compared; measured each for itself: {listed(measured)}."
            advice.append(Advice("worker pool", "no evidence", [why], ["a contest between worker pools"]))
    patterns = summary.contest(f"patterns/{pool}/{workload}")
    check = next((found for found in automatic if found.pool == pool), None)
    if patterns:
        advice.append(strategy_advice(patterns, check))
        for row in patterns.rows:
            if row.arm.pattern == OURS:
                continue
            for name in ("goodput", "cpu"):
                found = row.ratio(name)
                if is_better(found) and found:
                    losses.append(f"{row.arm.label} under {pool}: {evidence(found)} than celery-alchemy.")
                elif is_worse(found) and found:
                    wins.append(f"{row.arm.label} under {pool}: {evidence(found)} than celery-alchemy.")
            if row.broken:
                wins.append(f"{row.arm.label} under {pool}: {row.word}: {row.breaches[0].name}: no.")
    used = chosen or (patterns.reference if patterns else None)
    if used and used.speed:
        advice.append(_connection_advice(used))
    level = len(_level(contest, chosen)) if contest and chosen else 0
    return WorkloadAdvice(workload, advice, wins, losses, chosen, level)


def _best(contest: ContestSummary) -> Row | None:
    """Return the arm with the most goodput; of those it does not surely beat, the reference, or the smallest."""
    rows = [row for row in contest.rows if row.speed and not row.arm.copy]
    if not rows:
        return None
    best = max(rows, key=standing)
    level = [best, *(row for row in rows if row is not best and not _beats(contest, best, row))]
    reference = next((row for row in level if row.reference), None)
    return reference or min(level, key=_size)


def _level(contest: ContestSummary, chosen: Row) -> list[Row]:
    """Return the arms that the choice is not shown to be faster than."""
    others = [row for row in contest.rows if row.speed and row is not chosen and not row.arm.copy]
    return [row for row in others if not _beats(contest, chosen, row)]


def _beats(contest: ContestSummary, row: Row, other: Row) -> bool:
    found = contest.compare(row.name, other.name, "goodput")
    return found is not None and found.verdict == "faster"


def _size(row: Row) -> tuple[int, float, float]:
    cpu = row.speed.worker_cpu_ms if row.speed else None
    return row.arm.concurrency, row.pss_bytes, cpu or math.inf


def _pool_advice(summary: Summary, contest: ContestSummary, chosen: Row) -> Advice:
    lines = []
    if found := chosen.ratio("goodput"):
        reference = contest.reference
        lines.append(
            f"{where(chosen.arm)} to {where(reference.arm) if reference else 'the reference'}: {evidence(found)}."
        )
    elif chosen.reference:
        lines.append(f"{where(chosen.arm)} is the reference, and no other arm is shown to be faster.")
    for row in contest.rows:
        if row is chosen or row.arm.copy:
            continue
        if row.broken:
            lines.append(f"{where(row.arm)}: {row.word}: {row.breaches[0].name}: no.")
        elif against := contest.compare(row.name, chosen.name, "goodput"):
            doubt = f" ({against.reason})" if against.reason else ""
            lines.append(
                f"{where(row.arm)} to {where(chosen.arm)}: goodput {ratio(against)}, n = {against.estimate.n}: "
                f"{against.verdict}{doubt}."
            )
    limits = list(chosen.flags)
    sweeps = [sweep for sweep in summary.sweeps if sweep.workload == contest.workload]
    lines += _sweep_lines(summary, sweeps, chosen, limits)
    level = _level(contest, chosen)
    if level:
        why = "the reference is kept" if chosen.reference else "the one with the least concurrency and memory is taken"
        limits.append(
            f"No difference is shown to {listed(where(row.arm) for row in level)}: {why}. More rounds may show one."
        )
    return Advice("worker pool", f"{chosen.arm.pool}", lines, limits)


def _sweep_lines(summary: Summary, sweeps: Sequence[SweepSummary], chosen: Row, limits: list[str]) -> list[str]:
    if not sweeps:
        limits.append("No sweep was run: how latency grows with the load, and where it breaks, is not known.")
        return []
    found = {(sweep.arm.pool, sweep.arm.concurrency): sweep for sweep in sweeps if sweep.at_objective}
    own = found.get((chosen.arm.pool, chosen.arm.concurrency))
    lines = []
    if own and own.at_objective:
        most = "" if own.knee else " at least (the sweep ended there)"
        lines.append(
            f"Open load: {number(own.at_objective.offered_per_s)} tasks/s{most} within {summary.facts.objective}, "
            f"from one step of {own.at_objective.seconds:.0f} s."
        )
        better = [
            sweep
            for sweep in found.values()
            if sweep.at_objective and sweep.at_objective.offered_per_s > BY_LESS * own.at_objective.offered_per_s
        ]
        for sweep in better:
            assert sweep.at_objective is not None
            limits.append(
                f"Under open load {where(sweep.arm)} kept {summary.facts.objective} up to "
                f"{number(sweep.at_objective.offered_per_s)} tasks/s, more than the choice. Each sweep is one run: "
                f"this has no interval."
            )
    elif any((sweep.arm.pool, sweep.arm.concurrency) == (chosen.arm.pool, chosen.arm.concurrency) for sweep in sweeps):
        limits.append(f"Under open load no step of the choice met {summary.facts.objective}.")
    else:
        limits.append("No sweep of this arm was run.")
    return lines


def _concurrency_advice(contest: ContestSummary, chosen: Row) -> Advice:
    others = [
        row
        for row in contest.rows
        if row.arm.pool == chosen.arm.pool and row.speed and row is not chosen and not row.arm.copy
    ]
    if not others:
        line = f"Only concurrency {chosen.arm.concurrency} was measured under {chosen.arm.pool}."
        limits = [] if chosen.arm.pool == "solo" else ["Another concurrency may be better: measure with --concurrency."]
        return Advice("concurrency", str(chosen.arm.concurrency), [line], limits)
    lines, limits = [], []
    for row in others:
        if found := contest.compare(row.name, chosen.name, "goodput"):
            lines.append(f"{row.arm.concurrency} to {chosen.arm.concurrency}: {evidence(found)}.")
    if chosen.arm.concurrency >= max(row.arm.concurrency for row in others):
        limits.append("It is the largest that was measured: a larger one may be better still.")
    if not all(_beats(contest, chosen, row) for row in others):
        limits.append("Where no difference is shown, the smaller or the reference's is kept.")
    return Advice("concurrency", str(chosen.arm.concurrency), lines, limits)


# Connections


def _connection_advice(row: Row) -> Advice:
    assert row.speed is not None
    promised, peak = row.promised_connections, row.peak_connections
    lines = [
        f"{where(row.arm)}: at most {peak} connections seen at concurrency {row.arm.concurrency}"
        + (f", {promised} promised." if promised is not None else "; the worker knows no bound.")
    ]
    limits = ["Samples are taken every few milliseconds: a connection that opens and closes in between is missed."]
    checkout, run = row.speed.phases.get("checkout"), row.speed.phases.get("run")
    waits = False
    if checkout and run:
        waits = bool(run.p95) and checkout.p95 > CHECKOUT_SHARE * run.p95
        lines.append(
            f"Getting a connection took p50 {number(checkout.p50)} ms, p95 {number(checkout.p95)} ms of a run of p95 "
            f"{number(run.p95)} ms, n = {checkout.n}."
        )
    if waits:
        choice = f"larger than {peak}: tasks wait for a connection"
        limits.append("The server must allow that many connections for all workers together.")
    elif promised is not None and peak < promised:
        choice = f"the default: {peak} used, {promised} at most"
        limits.append("Nested units of work take from the reserve: a task that opens one needs a second connection.")
    else:
        choice = f"the default: {peak} used"
    return Advice("connection pool", choice, lines, limits)


# Overall


def _overall(summary: Summary, workloads: Sequence[WorkloadAdvice], automatic: Sequence[AutoCheck]) -> list[Advice]:
    contests = [found for found in summary.contests if found.kind == "pools"]
    advice: list[Advice] = []
    rows = _arms_right_everywhere(contests)
    if rows:
        name = _best_overall(contests, rows)
        advice += _overall_pool(contests, name, rows[name], workloads)
    checked = [check for check in automatic if check.agrees is not None]
    if checked and summary.measured:
        wrong = [check for check in checked if not check.agrees]
        choice = "auto" if not wrong else f"auto, except under {listed(check.pool for check in wrong)}"
        lines = [f"{check.pool}: auto takes {check.took}. {check.evidence[0]}" for check in checked]
        limits = ["A strategy of your own, or one that was not measured, is not covered."]
        advice.append(Advice("strategy", choice, lines, limits))
    measured = [
        row for contest in contests or summary.contests for row in contest.rows if row.speed and row.arm.pattern == OURS
    ]
    most = [row for row in measured if row.promised_connections is not None]
    if most:
        over = [row for row in most if row.peak_connections > (row.promised_connections or 0)]
        used = max(row.peak_connections / row.arm.concurrency for row in most)
        advice.append(
            Advice(
                "connection pool",
                "the default" if not over else "to be checked: more were open than promised",
                [
                    f"Over {count(len(most), 'arm')} at most {factor(used)} connections per unit of concurrency were "
                    f"open at a time, and in {len(over)} more than promised."
                ],
                ["Tasks with nested units of work, which take a second connection, were not measured."],
            )
        )
    return advice


def _best_overall(contests: Sequence[ContestSummary], ratios: dict[str, list[float]]) -> str:
    """Return the arm with the best mean; of those close to it, the one that is seldom slower, or the smallest."""
    best = max(geometric(values) for values in ratios.values())
    close = [name for name, values in ratios.items() if geometric(values) >= CLOSE * best]
    first = {row.name: row for contest in contests for row in contest.rows}
    return min(close, key=lambda name: (len(_where_said(contests, name, SLOWER)), _size(first[name])))


def _arms_right_everywhere(contests: Sequence[ContestSummary]) -> dict[str, list[float]]:
    """Return the goodput ratios of the arms that have one in every contest between worker pools."""
    found: dict[str, list[float]] = {}
    for contest in contests:
        if not contest.reference or not contest.reference.speed:
            continue
        for row in contest.rows:
            if row.speed and not row.arm.copy and (row.reference or row.ratio("goodput")):
                found.setdefault(row.name, []).append(standing(row))
    return {name: ratios for name, ratios in found.items() if len(ratios) == len(contests)}


def _where_said(contests: Sequence[ContestSummary], name: str, word: str) -> list[str]:
    """Return the workloads in which the goodput of an arm is said to be so."""
    said = []
    for contest in contests:
        row = contest.row(name)
        if row and (found := row.ratio("goodput")) and found.verdict == word:
            said.append(contest.workload)
    return said


def _overall_pool(
    contests: Sequence[ContestSummary], name: str, ratios: Sequence[float], workloads: Sequence[WorkloadAdvice]
) -> list[Advice]:
    rows = [row for contest in contests if (row := contest.row(name))]
    arm = rows[0].arm
    reference = next(contest.reference for contest in contests if contest.reference)
    faster, slower = (_where_said(contests, name, word) for word in (FASTER, SLOWER))
    lines = []
    if arm == reference.arm:
        lines.append(
            f"{where(arm)} is the reference; no other arm has more goodput in the geometric mean of "
            f"{count(len(ratios), 'workload')}."
        )
    else:
        lines.append(
            f"{where(arm)} to {where(reference.arm)}: geometric mean of goodput {factor(geometric(ratios))} over "
            f"{count(len(ratios), 'workload')}; faster in {listed(faster) if faster else 'none'}, slower in "
            f"{listed(slower) if slower else 'none'}."
        )
    by_choice: dict[str, list[str]] = {}
    for found in workloads:
        if found.row:
            by_choice.setdefault(where(found.row.arm), []).append(found.workload)
    lines += [f"{place}: first choice for {listed(names)}." for place, names in by_choice.items()]
    lines.append(f"Memory (PSS) of {where(arm)}: {mebibytes(max(row.pss_bytes for row in rows))} MiB at most.")
    limits = []
    if len(by_choice) > 1:
        limits.append("No worker pool is the first choice everywhere. Go by the workload that is most like yours.")
    limits.append("The mean weighs every workload alike; your tasks do not.")
    return [
        Advice("worker pool", f"{arm.pool}", lines, limits),
        Advice("concurrency", str(arm.concurrency), lines[:1], limits[-1:]),
    ]


def _limits(summary: Summary) -> list[str]:
    lines = [
        "CPU per task contains what every arm pays alike: Celery, its log lines, the answer to the load generator. "
        "Between the patterns themselves the ratios are farther from 1.",
        "Worker, load generator, database and broker share one machine: where the database is elsewhere, waiting "
        "weighs more and its CPU less.",
        "Each interval is right in 95 of 100 cases: among many contests some will be wrong. A difference is claimed "
        "only beyond the A/A floor, and only if the batches agree.",
        "Ratios hold for this hardware, these versions and these workloads. Measure your own task: "
        "celery -A proj alchemy bench --task proj.tasks.x",
    ]
    if any(sweep.steps for sweep in summary.sweeps):
        lines.append(
            "Throughput at the objective comes from one sweep for each arm, one after the other and not in turns, "
            "without an interval."
        )
    return [*summary.flags, *lines]
