"""Every table of a report, made once: the terminal, the page and Markdown only draw them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..bench.results import Counted
from ..bench.rows import Percentiles
from ..tasks.patterns import OURS
from .recommendation import NO_EVIDENCE, Choice
from .statistics import METRICS, Groups, Ratio, estimate
from .summary import ContestSummary, Row, Standing, Summary, SweepSummary
from .wording import count, factor, interval, listed, name_in, number, percent, sizes, where

RECIPE, COMPARABLE = "recipe", 0.9
"""A worker that answered less than this share of its orders has not done the work that its CPU is compared for."""


class Cell(NamedTuple):
    """What stands in one place of a table."""

    text: str
    style: str = ""  # `good`, `bad`, `broken` or `muted`
    note: str = ""  # A second line, where there is room for one


@dataclass(frozen=True, slots=True)
class Table:
    """A table: the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]]
    note: str = ""

    def only(self, *columns: str) -> Table:
        """Return the table with these columns, in its own order; every column of a name."""
        kept = [place for place, name in enumerate(self.columns) if name in columns or not place]
        rows = [[row[place] for place in kept] for row in self.rows]
        return Table(self.title, [self.columns[place] for place in kept], rows, self.note)


def table(title: str, columns: str, rows: Iterable[Sequence[Cell | str]], note: str = "") -> list[Table]:
    """Return a table in a list; an empty list where it has no rows. The end of a short row is filled with dashes."""
    names = [name.strip() for name in columns.split("|")]
    full = [[*row, *["-"] * (len(names) - len(row))] for row in rows]
    made = [[one if isinstance(one, Cell) else Cell(one) for one in row] for row in full]
    # A column without a word in it says nothing.
    kept = [place for place in range(len(names)) if any(row[place].text for row in made)]
    rows_kept = [[row[place] for place in kept] for row in made]
    return [Table(title, [names[place] for place in kept], rows_kept, note)] if made else []


def ratio_cell(found: Ratio | None) -> Cell:
    """Return a ratio with its interval, its verdict, and what both rest on."""
    if found is None:
        return Cell("-", "muted")
    style = "good" if found.better else "bad" if found.worse else "muted"
    word = f" {found.verdict}" if found.better or found.worse else ""
    # That an interval holds 1 can be seen.
    why = f"{found.reason}; " if found.reason and not (found.estimate.low and not found.estimate.excludes_one) else ""
    return Cell(f"{interval(found.estimate)}{word}", style, f"{why}{sizes(found.estimate)}")


def correctness(summary: Summary) -> str:
    """Return how much was right, in a sentence."""
    rows = [row for contest in summary.contests for row in contest.rows if not row.arm.copy]
    if not rows:
        return "Nothing was compared: no contest was run."
    broken = [row for row in rows if row.broken and not row.blocked]
    blocked = [row for row in rows if row.blocked]
    ours = [row for row in rows if row.arm.pattern == OURS]
    said = f"{len(broken)} of {len(rows)} combinations of worker pool, pattern and workload broke an invariant"
    said += f" ({listed(dict.fromkeys(row.arm.label for row in broken))})" if broken else ""
    said += f"; celery-alchemy kept every one in {sum(not row.broken for row in ours)} of {len(ours)}."
    if blocked:
        said += f" {len(blocked)} were not run: their driver blocks the green hub, which is not the pattern's doing."
    return said


def choices(found: Sequence[Choice]) -> list[Table]:
    """Return what to choose, with the ratios that the rule goes by; nothing where it had none to go by."""
    rows = [
        (
            f"{one.topic} {one.subject}",
            Cell(one.choice, "good" if one.changed else "bad" if one.choice == NO_EVIDENCE else ""),
            one.against, ratio_cell(one.goodput), ratio_cell(one.cpu),
        )
        for one in found if one.goodput or one.choice == NO_EVIDENCE
    ]  # fmt: skip
    note = "Ratios are those of the arm that is not the reference to the reference."
    return table("What to choose", "for | choose | rather than | goodput | worker CPU per task", rows, note)


def standings(summary: Summary) -> list[Table]:
    """Return each pattern under each worker pool, over all workloads."""
    found: dict[str, list[list[Cell | str]]] = {}
    for one in summary.standings:
        blocked = f", driver blocks in {one.blocked}" if one.blocked else ""
        right = Cell(f"{one.broken} of {one.cells}{blocked}", "broken" if one.broken or blocked else "good")
        ratios = [ratio_cell(one.ratios.get(name)) for name in ("goodput", "cpu", "database_cpu", "p95")]
        found.setdefault(one.pool, []).append([one.arm.label, right, *ratios])
    columns = "pattern | broken | goodput | worker CPU per task | database CPU per task | p95"
    note = "Ratios to the reference, from all workers of all contests in which the pattern is right."
    return [one for pool, rows in found.items() for one in table(f"{pool}, over all workloads", columns, rows, note)]


def by_pool(summaries: Iterable[Summary], what: str, pools: Sequence[str] = ()) -> Table:
    """Return a metric of every pattern under every worker pool side by side; or, for `right`, in how many workloads."""
    standings = [one for summary in summaries for one in summary.standings if not pools or one.pool in pools]

    def cell(one: Standing) -> Cell:
        if one.blocked:
            return Cell("blocks")
        if what == "right":
            return Cell(f"{one.cells - one.broken} of {one.cells}")
        return ratio_cell(one.ratios[what]) if one.ratios else Cell("wrong" if one.broken else "is 1")

    pools = pools or list(dict.fromkeys(one.pool for one in standings))
    found: dict[str, dict[str, Cell]] = {}
    for one in sorted(standings, key=lambda one: one.arm.pattern != OURS):
        found.setdefault(one.arm.label, {})[one.pool] = cell(one)
    rows = [[Cell(label), *(cells.get(pool, Cell("")) for pool in pools)] for label, cells in found.items()]
    return Table("", ["pattern", *pools], rows)


def contests(summary: Summary, kind: str) -> list[Table]:
    """Return the contests of a kind, arm by arm."""
    return [made for one in summary.of_kind(kind) for made in contest(one)]


def contest(one: ContestSummary) -> list[Table]:
    """Return one contest, arm by arm."""
    measured = f"{count(one.workers, 'restart')}, {count(one.rounds, 'round')}" if one.rounds else "checked only"
    floor = f", A/A floor {percent(one.floors['goodput'])}" if "goodput" in one.floors else ""
    columns = (
        "arm | right | goodput /s | ratio | CPU ms/task | ratio | DB ms/task | p50 ms | p95 ms | p99 ms | p99.9 ms "
        "| connections | MiB"
    )
    return table(f"{one.name}: {measured}{floor}", columns, (_row(one.kind, row) for row in one.rows), one.note)


def _row(kind: str, row: Row) -> list[Cell | str]:
    name = Cell(name_in(kind, row.arm), "", f"takes {row.cells[0].strategy}" if row.arm.strategy == "auto" else "")
    if row.broken:
        return [name, Cell(row.word, "broken", f"{row.breaches[0].name}: no")]
    promised, memory = row.most("promised_connections"), row.most("pss_bytes")  # Memory is that of the first batch
    seen = [f"{row.most('peak_connections')} of {'?' if promised is None else promised}"]
    seen.append(f"{memory / 2**20:.0f}" if memory else "-")
    if not (speed := row.speed):
        return [name, Cell("ok", "good"), *["-"] * 9, *seen]
    goodput, cpu = (
        Cell(row.word, "muted") if row.reference else ratio_cell(row.ratios.get(one)) for one in ("goodput", "cpu")
    )
    return [
        name, Cell("ok", "good"), number(speed.goodput_per_s), goodput, number(speed.worker_cpu_ms), cpu,
        number(speed.database_cpu_ms), *_percentiles(speed.latency, "p50", "p95", "p99", "p999"), *seen,
    ]  # fmt: skip


def _percentiles(found: Percentiles | None, *names: str) -> list[str]:
    return [number(getattr(found, name, None)) for name in names]


def open_loads(summary: Summary) -> list[Table]:
    """Return the most that each arm kept under open load."""
    return table(
        f"Open load within {summary.facts.objective}",
        "arm | sweeps | tasks/s kept | goodput there | p50 ms | p99 ms | p99.9 ms | p99.9 uncorrected | late | skipped",
        (_sweep(one) for one in summary.sweeps),
        "Kept: the highest rate that met the objective, the median of the sweeps, in brackets the least and the most. "
        "Latency counts from when a task was due; uncorrected, from when it was sent. Late: answered later than the "
        "objective; skipped: due too long ago to be sent; both of all steps.",
    )


def _sweep(one: SweepSummary) -> list[Cell | str]:
    name = f"{one.workload}, {where(one.arm)}"
    if one.breaches:
        return [name, Cell("broken", "broken", f"{one.breaches[0].name}: no. {one.breaches[0].detail}")]
    if (knee := one.knee) is None:
        return [name, Cell("not measured", "muted")]
    rates = sorted(step.achieved_per_s for step in one.kept if step)
    sure = f"covers the median in {knee.coverage:.1%}" if knee.sweeps > 1 else "one sweep: no interval"
    return [
        name, str(knee.sweeps),
        Cell(str(knee), "", f"{'at least; ' if knee.open_ended else ''}{sure}"),
        number(rates[len(rates) // 2] if rates else None),
        *_percentiles(one.latency("latency"), "p50", "p99", "p999"), *_percentiles(one.latency("uncorrected"), "p999"),
        str(sum(step.late for step in one.steps)), str(sum(step.skipped for step in one.steps)),
    ]  # fmt: skip


def phases(summary: Summary) -> list[Table]:
    """Return where the time of a task goes, by contest and arm."""
    names, found = ("queue", "checkout", "database", "run"), list[Table]()
    for one in summary.contests:
        rows = [
            [name_in(one.kind, row.arm),
             *(", ".join(_percentiles(row.speed.phases[name], "p50", "p95")) if name in row.speed.phases else "-"
               for name in names)]
            for row in one.rows if row.speed and row.speed.phases.get("run") and not row.arm.copy
        ]  # fmt: skip
        found += table(f"{one.name}: ms, median and p95", " | ".join(["arm", *names]), rows)
    return found


def round_trips(summary: Summary) -> list[Table]:
    """Return how often a task waits for the database's answer."""
    patterns = list(dict.fromkeys(name for counted in summary.facts.round_trips.values() for name in counted))
    rows: list[list[Cell | str]] = [
        [name, *(number(counted.get(one)) for one in patterns)] for name, counted in summary.facts.round_trips.items()
    ]
    return table("Round trips per task, counted by a proxy", " | ".join(["workload", *patterns]), rows)


def _places(summary: Summary) -> list[tuple[str, Row]]:
    """Return every row of every contest, with what a reader finds it by."""
    return [(f"{one.name}, {name_in(one.kind, row.arm)}", row) for one in summary.contests for row in one.rows]


def breaches(summary: Summary) -> list[Table]:
    """Return what was wrong: every breach, and once for each arm the failures that the workload did not intend."""
    rows: list[Sequence[Cell | str]] = []
    for place, row in _places(summary):
        errors = sum((Counter(cell.errors) for cell in row.cells), Counter[str]())
        log = next((cell.log for cell in row.cells if cell.broken and cell.log), "")
        rest: Sequence[str] = (", ".join(f"{n} {error}" for error, n in errors.most_common()), log)
        for breach in row.breaches:
            rows.append((place, Cell(f"{breach.name}: no", "broken"), breach.detail, *rest))
            rest = ("", "")
    rows += [
        (f"open load: {one.workload}, {where(one.arm)}", Cell(f"{breach.name}: no", "broken"), breach.detail, "", "")
        for one in summary.sweeps for breach in one.breaches
    ]  # fmt: skip
    rows += [
        (place, Cell("not checked", "muted"), said, "", "")
        for place, row in _places(summary)
        for said in dict.fromkeys(
            f"{one.name}: {one.detail}" for cell in row.cells for one in cell.verdicts if one.passed and one.detail
        )
    ]
    return table("Every breach", "where | invariant | found | failures | end of its log", rows)


def noise(summary: Summary) -> list[Table]:
    """Return how far identical arms were apart, and what disturbed."""
    rows = [
        [one.name, str(one.workers), str(one.rounds), *(percent(one.floors.get(metric)) for metric in METRICS)]
        for one in summary.contests if one.floors
    ]  # fmt: skip
    columns = " | ".join(["contest", "restarts", "rounds", *(metric.label for metric in METRICS.values())])
    flags: dict[str, list[str]] = {}
    for place, flagged in [
        *((place, row.speed.flags) for place, row in _places(summary) if row.speed),
        *((f"{one.workload}, {where(one.arm)}", one.flags) for one in summary.sweeps),
    ]:
        for flag in flagged:
            flags.setdefault(flag.partition(":")[0], []).append(f"{place}: {flag}")
    marked = [(Cell(kind, "bad"), str(len(found)), found[0]) for kind, found in flags.items()]
    return [
        *table("A/A floor: what identical arms differed by", columns, rows),
        *table("What to keep in mind", "what | rows | the first of them", marked),
    ]


def facts(summary: Summary) -> list[Table]:
    """Return what the numbers depend on."""

    def pairs(found: Mapping[str, object]) -> str:
        return ", ".join(f"{name} {value}" for name, value in found.items())

    of = summary.facts
    options = {part: found for part, found in of.options.items() if isinstance(found, dict)}
    rows = [
        ("command", of.command), ("begun", of.begun), ("services", ", ".join(of.services)), *of.machine.items(),
        ("versions", pairs(of.versions)),
        *((f"options of {part}", pairs(found)) for part, found in options.items()),
        *((f"workload {name}", said) for name, said in of.workloads.items()),
        *((f"pattern {name}", said) for name, said in of.patterns.items()),
    ]  # fmt: skip
    return table("What the numbers depend on", "what | which", [row for row in rows if row[1]])


def demo(summary: Summary) -> list[Table]:
    """Return the recipe and celery-alchemy side by side, under each worker pool."""
    rows: list[list[Cell | str]] = []
    for pool, row, times in side_by_side(summary):
        name, found = f"{pool}, {row.arm.pattern}", row.counted
        if found is None:
            wrong = f"{row.word}: {row.breaches[0].name}" if row.broken else "-"
            rows.append([name, Cell(wrong, "broken")])
            continue
        rows.append([
            name, Cell(f"{found.right} of {found.sent}", "good" if found.right == found.sent else "broken"),
            str(found.wrong), str(found.unanswered),
            Cell(str(found.connections_left), "broken" if found.connections_left else ""),
            number(found.right / found.seconds if found.seconds else None),
            Cell(number(_cpu_ms(found)), "", f"{factor(estimate(times).middle)}x" if times else ""),
        ])  # fmt: skip
    return table(
        "Every order, looked up in the database",
        "worker pool, Session by | right | wrong | lost | left | right /s | CPU ms",
        rows,
        "Right: answered once, ended as it was meant to, and the database holds exactly what it says. Lost: no answer. "
        "Left: connections in a transaction or checked out after the last answer. Right /s: goodput. CPU ms: of the "
        "worker, per answered order; 1.00x: as much as the recipe, shown where that answered nine of ten.",
    )


def side_by_side(summary: Summary) -> list[tuple[str, Row, Groups]]:
    """Return the arms of a demo, under each worker pool what is written by hand first, with the worker pool.

    The numbers are ours, of each restart: CPU per answered order, as a multiple of the other's; none where that
    answered too few to tell.
    """
    found: list[tuple[str, Row, Groups]] = []
    for one in summary.of_kind("demo"):
        by_hand, *_ = rows = sorted(one.rows, key=lambda row: row.arm.pattern == OURS)
        for row in rows:
            pairs = [(a.counted, b.counted) for a, b in zip(row.cells, by_hand.cells, strict=True) if row != by_hand]
            known = [(a, b) for a, b in pairs if a and b and b.unanswered <= (1 - COMPARABLE) * b.sent]
            times = [[cost / base] for a, b in known if (cost := _cpu_ms(a)) and (base := _cpu_ms(b))]
            found.append((one.pool, row, times))
    return found


def _cpu_ms(found: Counted | None) -> float | None:
    answered = found.sent - found.unanswered if found else 0
    return 1000 * found.worker_cpu_s / answered if found and answered else None


def demo_in_short(summary: Summary) -> list[str]:
    """Return what a demo shows: the worker pool where the two differ most, and all of them together."""
    found = [(pool, row.arm.pattern == OURS, row.counted) for pool, row, _ in side_by_side(summary) if row.counted]
    by_hand = [(pool, one) for pool, own, one in found if not own]
    if not by_hand or len(by_hand) == len(found):
        return []
    worst, _ = min(by_hand, key=lambda one: one[1].right / max(1, one[1].sent))
    lines = []
    for said, pools in ((f"Under {worst}", {worst}), ("In all", {pool for pool, *_ in found})):
        (a, b), (c, d) = (
            [sum(getattr(one, what) for pool, own, one in found if own is ours and pool in pools)
             for what in ("right", "sent")] for ours in (False, True)
        )  # fmt: skip
        lines.append(f"{said} the {RECIPE} got {a:,} of {b:,} orders right; celery-alchemy {c:,} of {d:,}")
    times = [one for *_, of_pool in side_by_side(summary) for one in of_pool]
    cost = f", at {interval(estimate(times))} times the worker CPU per order" if times else ""
    return [f"{lines[0]}.", f"{lines[1]}{cost}."]
