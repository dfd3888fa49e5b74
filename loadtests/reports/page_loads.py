"""The parts of the page about open load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from . import charts
from .markup import ChartNames, Content, bullets, folded, paragraph, scroll, styled, table
from .summary import Summary, SweepSummary
from .wording import number, where


def _by_workload(sweeps: Iterable[SweepSummary]) -> Iterator[tuple[str, list[SweepSummary]]]:
    found: dict[str, list[SweepSummary]] = {}
    for sweep in sweeps:
        found.setdefault(sweep.workload, []).append(sweep)
    yield from found.items()


def latency(summary: Summary, names: ChartNames) -> str:
    if not summary.sweeps:
        return paragraph("No sweep was run: celery alchemy bench sweep --out ... adds one.")
    parts = [
        paragraph(
            "Tasks arrive at random, at a rate that rises step by step, whatever the worker does. Latency counts "
            "from the "
            "moment a task should have been sent to its end in the worker. The shaded part holds the knee: its left "
            "edge "
            f"met the objective {summary.facts.objective}, its right edge did not."
        )
    ]
    for place, (workload, sweeps) in enumerate(_by_workload(summary.sweeps)):
        chart = charts.latency(workload, sweeps, summary, names.next())
        inner = scroll(chart, f"Latency against offered load, {workload}") if chart else ""
        broken = [f"{where(sweep.arm)} is broken: {sweep.breaches[0].name}: no." for sweep in sweeps if sweep.breaches]
        flags = [f"{where(sweep.arm)}: {flag}." for sweep in sweeps for flag in sweep.flags]
        empty = "" if chart else paragraph("No step of this sweep can be shown.")
        parts.append(
            folded(workload, empty + inner + bullets([*broken, *flags]) + _steps(workload, sweeps), place == 0)
        )
    return "".join(parts)


def _steps(workload: str, sweeps: Sequence[SweepSummary]) -> str:
    rows: list[list[Content]] = [
        [
            where(sweep.arm), number(step.offered_per_s), number(step.achieved_per_s),
            *(number(getattr(step.latency, name)) if step.latency else "-" for name in ("p50", "p95", "p99")),
            str(step.latency.n if step.latency else 0), str(step.failed), str(step.unanswered),
            number(step.worker_cpus),
            styled("good", "met") if step.met else styled("bad", "not met"),
        ]
        for sweep in sweeps
        for step in sweep.steps
    ]  # fmt: skip
    if not rows:
        return ""
    columns = (
        "arm", "offered /s", "achieved /s", "p50 ms", "p95 ms", "p99 ms", "n", "failed", "unanswered", "worker CPUs",
        "objective",
    )  # fmt: skip
    return folded("The steps in numbers", table(f"{workload}: steps of the sweeps", columns, rows, range(1, 10)))


def throughput(summary: Summary, names: ChartNames) -> str:
    if not summary.sweeps:
        return paragraph("No sweep was run, so it is not known.")
    parts = [
        paragraph(
            f"The highest rate offered at which {summary.facts.objective} held, no task failed, and what was "
            f"offered was "
            "achieved. Each comes from one sweep, one arm after the other, and has no interval."
        )
    ]
    for place, (workload, sweeps) in enumerate(_by_workload(summary.sweeps)):
        chart = charts.throughput(workload, sweeps, summary, names.next())
        best = max((sweep.at_objective.offered_per_s for sweep in sweeps if sweep.at_objective), default=None)
        said = f"{workload}: up to {number(best)} tasks/s" if best else f"{workload}: kept at no rate"
        rest = bullets(f"{where(sweep.arm)}: {charts.knee_words(sweep)}" for sweep in sweeps) if not chart else ""
        inner = scroll(chart, f"Throughput at the objective, {workload}") if chart else ""
        parts.append(folded(said, inner + rest, place == 0))
    return "".join(parts)
