"""The recommendation in a few sentences, for someone who was not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..bench.results import Arm
from ..patterns import OURS
from .automatic import Advice, AutoCheck
from .standings import Standing
from .summary import Summary, SweepSummary
from .together import PoolStanding
from .wording import at, count, listed, number, percent, pool_ratio, where


def in_short(
    summary: Summary,
    overall: Sequence[Advice],
    choices: Mapping[str, Arm],
    undecided: Sequence[str],
    automatic: Sequence[AutoCheck],
    standings: Sequence[Standing],
    by_pool: Sequence[PoolStanding],
) -> list[str]:
    """Return the recommendation in short.

    Args:
        choices: The worker pool and concurrency for each workload, where there is one.
        undecided: Workloads in which no difference to some other arm is shown.
    """
    lines = [_correctness_line(summary), *_sweep_summary(summary)]
    if not summary.measured:
        return [*lines, "No arms were compared in turns, so nothing is recommended."]
    by_choice: dict[str, list[str]] = {}
    for workload, arm in choices.items():
        by_choice.setdefault(at(arm), []).append(workload)
    if by_choice:
        lines.append(
            "Worker pool and concurrency: "
            + "; ".join(f"{place} for {listed(names)}" for place, names in by_choice.items())
            + "."
            + (f" For {listed(undecided)} other arms may be as good: no difference is shown." if undecided else "")
        )
    else:
        lines.append("Worker pools were not compared with each other, so none is recommended.")
    if strategy := next((advice for advice in overall if advice.topic == "strategy"), None):
        checked = [check for check in automatic if check.agrees is not None]
        agree = [check for check in checked if check.agrees]
        lines.append(
            f"Strategy: {strategy.choice}. Nothing is shown to be better than what auto takes under {len(agree)} of "
            f"{count(len(checked), 'worker pool')} ({', '.join(f'{check.pool}: {check.took}' for check in checked)})."
            f"{_unseen(summary)}"
        )
    if connection := next((advice for advice in overall if advice.topic == "connection pool"), None):
        lines.append(f"Connection pool: {connection.choice}. {connection.evidence[0]}")
    by_hand = [found for found in standings if not found.pattern.startswith(OURS) and found.tallies["goodput"].contests]
    if by_hand:
        faster, slower, level = (
            sum(getattr(found.tallies["goodput"], name) for found in by_hand) for name in ("better", "worse", "neither")
        )
        cheaper, dearer = (
            sum(getattr(found.tallies["cpu"], name) for found in by_hand) for name in ("better", "worse")
        )
        lines.append(
            f"Patterns written by hand, where they are right, against celery-alchemy: faster in {faster}, slower in "
            f"{slower}, no difference shown in {level} of {faster + slower + level} comparisons; less worker CPU per "
            f"task in {cheaper}, more in {dearer}."
        )
    lines += _plain_session(by_pool)
    return lines


def _plain_session(by_pool: Sequence[PoolStanding]) -> list[str]:
    """Return what is saved without us, by the pattern that does the least; nothing if it was not measured."""
    found = [one for one in by_pool if one.pattern == "with_session"]
    if not found:
        return []
    told = "; ".join(
        f"{one.pool}: goodput {pool_ratio(one.ratios.get('goodput'))}, worker CPU per task "
        f"{pool_ratio(one.ratios.get('cpu'))}"
        for one in found
    )
    return [f"A plain `with Session(engine)` against celery-alchemy, over all workloads of a worker pool: {told}."]


def _unseen(summary: Summary) -> str:
    """Return how small a difference in goodput could have been and gone unnoticed."""
    floors = [found.floors["goodput"] for found in summary.contests if "goodput" in found.floors]
    return (
        f" Differences in goodput below {percent(min(floors))} to {percent(max(floors))} would not be seen."
        if floors
        else ""
    )


def _sweep_summary(summary: Summary) -> list[str]:
    """Return the most that was kept under open load, in one sentence; nothing if no sweep was run."""
    if not summary.sweeps:
        return []
    best: dict[str, tuple[float, SweepSummary]] = {}
    for sweep in summary.sweeps:
        rate = sweep.at_objective.offered_per_s if sweep.at_objective else 0.0
        if rate > best.get(sweep.workload, (0.0, sweep))[0]:
            best[sweep.workload] = rate, sweep
    broken = sum(bool(sweep.breaches) for sweep in summary.sweeps)
    rest = f" {broken} of {len(summary.sweeps)} sweeps broke an invariant and show no rate." if broken else ""
    if not best:
        return [f"Open load within {summary.facts.objective}: kept by no arm at any rate.{rest}"]
    told = "; ".join(f"{name} {number(rate)}/s ({where(sweep.arm)})" for name, (rate, sweep) in best.items())
    return [f"Most tasks under open load within {summary.facts.objective}, from one sweep each: {told}.{rest}"]


def _correctness_line(summary: Summary) -> str:
    cells = [(contest, row) for contest in summary.contests for row in contest.rows if not row.arm.copy]
    broken = [(contest, row) for contest, row in cells if row.broken and not row.blocked]
    blocked = [row for _, row in cells if row.blocked]
    if not cells:
        return "Nothing was compared: no contest was run."
    ours = [(contest, row) for contest, row in cells if row.arm.pattern == OURS]
    wrong = sum(row.broken for _, row in ours)
    own = f"celery-alchemy kept every invariant in {len(ours) - wrong} of {len(ours)}."
    rest = ""
    if blocked:
        names = listed(dict.fromkeys(row.arm.label for row in blocked))
        pools = listed(dict.fromkeys(row.arm.pool for row in blocked))
        rest = (
            f" {len(blocked)} more were not run, because their driver blocks the green hub ({names} under {pools}): "
            f"that is the driver's doing and not the pattern's."
        )
    if not broken and blocked:
        return f"No combination of worker pool, pattern and workload that was run broke an invariant.{rest}"
    if not broken:
        return f"Every invariant held in all {count(len(cells), 'combination')} of worker pool, pattern and workload."
    labels = list(dict.fromkeys(row.arm.label for _, row in broken))
    return (
        f"{len(broken)} of {len(cells)} combinations of worker pool, pattern and workload broke an invariant and show "
        f"no speed ({listed(labels)}); {own}{rest}"
    )
