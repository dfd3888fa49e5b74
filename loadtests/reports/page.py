"""The report as one page that needs nothing but a browser: no script, no network, no other file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..bench.results import BATCHES_FILE, ROUND_TRIPS_FILE, RUN_FILE, SWEEP_FILE, TASKS_DIRECTORY
from . import charts
from .automatic import Advice
from .markup import Content, Text, bullets, escape, folded, paragraph, scroll, section, styled, table, with_note
from .recommendation import Recommendation, recommend
from .standings import Standing
from .style import STYLE
from .summary import SUMMARY_FILE, ContestSummary, Row, Summary, SweepSummary, summarise
from .wording import count, factor, interval, listed, mebibytes, number, percent, where

PAGE_FILE = "index.html"
LOG_LINES = 15


def write_page(directory: Path) -> Path:
    """Write `index.html` into a result directory, and return its path."""
    summary = summarise(directory)
    path = directory / PAGE_FILE
    path.write_text(page(summary, recommend(summary), directory), encoding="utf-8")
    return path


def page(summary: Summary, found: Recommendation, directory: Path) -> str:
    """Return the whole page."""
    names = _Names()
    sections = [
        ("environment", "Environment and noise floor", _environment(summary)),
        ("correctness", "What was right", _correctness(summary)),
        ("patterns", "Session patterns compared", _patterns(summary, found, names)),
        ("pools", "Worker pools compared", _pools(summary, names)),
        ("latency", "Latency against offered load", _latency(summary, names)),
        ("throughput", "Throughput at the objective", _throughput(summary, names)),
        ("connections", "Connections", _connections(summary, names)),
        ("memory", "Memory", _memory(summary, names)),
        ("phases", "Where the time goes", _phases(summary, names)),
        ("round-trips", "Round trips", _round_trips(summary)),
        ("errors", "Errors", _errors(summary)),
        ("recommendation", "The recommendation, with its evidence and limits", _recommendation(found)),
        ("raw", "Raw data and commands", _raw(summary, directory)),
    ]
    contents = "".join(f'<li><a href="#{anchor}">{html.escape(title)}</a></li>' for anchor, title, _ in sections)
    body = "".join(section(anchor, title, inner) for anchor, title, inner in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>celery-alchemy: benchmark</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>Sessions in Celery workers, under load</h1>
{_opening(summary)}
<div class="short"><p><b>In short</b></p>{"".join(paragraph(line) for line in found.in_short)}</div>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
{body}
<footer>Made by celery-alchemy {html.escape(summary.facts.versions.get("celery-alchemy", ""))} from the files beside
this page. Begun {html.escape(summary.facts.begun)}.</footer>
</main>
</body>
</html>
"""


class _Names:
    """Gives each chart a name of its own: the ids in it must not be those of another."""

    def __init__(self) -> None:
        self._count = 0

    def next(self) -> str:
        self._count += 1
        return f"chart{self._count}"


def _opening(summary: Summary) -> str:
    contests = len(summary.contests)
    text = (
        "A Celery task that uses SQLAlchemy needs a Session, and there are several ways to give it one. Here real "
        "workers were started under each worker pool with each of these patterns, on a real database and a real "
        "broker, and were given the same tasks. First it was checked whether the results are right; only where they "
        "are, speed was measured. The arms of a contest took turns of about a second each, so that whatever else the "
        "machine was doing hit all of them alike, and each is compared with the reference in the same round."
    )
    size = (
        f"{count(contests, 'contest')} between "
        f"{count(len({row.name for one in summary.contests for row in one.rows}), 'arm')}"
        f", {count(len(summary.workloads), 'workload')}, {count(len(summary.sweeps), 'sweep')}."
    )
    words = "".join(
        f"<dt>{html.escape(term)}</dt><dd>{html.escape(meaning)}</dd>"
        for term, meaning in (
            ("goodput", "Tasks per second that succeeded. Failed ones do not count, however fast they failed."),
            ("ratio", "An arm's number divided by the reference's of the same round; the median over all rounds."),
            ("interval", "Behind a ratio, in brackets: covers the true median in at least 95 of 100 such runs."),
            ("A/A floor", "How far apart two identical arms were. Nothing smaller is called a difference."),
            ("no difference shown", "The interval holds 1, or the ratio is within the floor, or the batches disagree. "
             "It does not say that there is none."),
            ("broken", "An invariant did not hold. No speed is shown, because broken arms look fast."),
        )
    )  # fmt: skip
    return paragraph(text) + paragraph(size, "muted") + folded("What the words mean", f'<dl class="facts">{words}</dl>')


def _facts(items: Iterable[tuple[str, Content]]) -> str:
    inner = "".join(f"<dt>{html.escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items if value)
    return f'<dl class="facts">{inner}</dl>'


def _environment(summary: Summary) -> str:
    facts = summary.facts
    items: list[tuple[str, Content]] = [
        ("begun", facts.begun),
        ("machine", ", ".join(f"{name}: {value}" for name, value in facts.machine.items())),
        ("versions", ", ".join(f"{name} {value}" for name, value in facts.versions.items())),
        ("services", ", ".join(facts.services)),
        ("objective", facts.objective),
    ]
    for part, options in facts.options.items():
        shown = options.items() if isinstance(options, dict) else [("", options)]
        items.append((f"options: {part}", ", ".join(f"{name} {_plain(value)}".strip() for name, value in shown)))
    flags = bullets(styled("bad", flag) for flag in summary.flags)
    workloads = folded(
        "Workloads and patterns",
        "<h3>Workloads</h3>" + _facts(facts.workloads.items()) + "<h3>Patterns</h3>" + _facts(facts.patterns.items()),
    )
    return _facts(items) + workloads + "<h3>Noise</h3>" + flags + _noise(summary)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _noise(summary: Summary) -> str:
    contests = [contest for contest in summary.contests if contest.floors]
    if not contests:
        return paragraph("No arm was measured twice, so the noise is not known and no difference is claimed.")
    speeds = [row.speed for contest in summary.contests for row in contest.rows if row.speed]
    foreign = sorted(speed.foreign_cpus for speed in speeds)
    share = max(speed.generator_share for speed in speeds)
    rows = [
        (
            contest.name,
            f"{contest.rounds} in {contest.batches}",
            *(percent(contest.floors.get(metric)) for metric in ("goodput", "cpu", "database_cpu", "p50", "p95")),
        )
        for contest in contests
    ]
    floors = [contest.floors["goodput"] for contest in contests if "goodput" in contest.floors]
    spread = f"{percent(min(floors))} to {percent(max(floors))}" if floors else "unknown"
    return paragraph(
        f"A/A floor of goodput: {spread}, depending on the contest. Other programs kept {number(foreign[0], 2)} to "
        f"{number(foreign[-1], 2)} CPUs busy (median of each row's slices). The load generator used {share:.0%} of "
        f"a CPU "
        f"at most."
    ) + folded(
        "The floor of each contest",
        table(
            "A/A floor: what identical arms differed by",
            ("contest", "rounds in batches", "goodput", "worker CPU", "database CPU", "p50", "p95"),
            rows,
            range(1, 7),
        ),
    )


# Correctness


def _correctness(summary: Summary) -> str:
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
        "ok: every invariant held. - : not run; the pattern is nothing of its own under that worker pool, or was not "
        "asked for."
    )
    return paragraph(key, "small muted") + overview + details


def _broken_words(contests: Sequence[ContestSummary], workload: str) -> str:
    rows = [row for one in contests if one.workload == workload for row in one.rows if not row.arm.copy]
    broken = sum(row.broken for row in rows)
    return f"{broken} of {len(rows)} broken" if broken else f"all {len(rows)} ok"


def _matrix_cell(rows: Sequence[Row]) -> Content:
    if not rows:
        return "-"
    broken = [row for row in rows if row.broken]
    if not broken:
        return styled("ok", "ok")
    names = list(dict.fromkeys(breach.name for row in broken for breach in row.breaches))
    head = "broken" if len(rows) == 1 else f"broken in {len(broken)} of {len(rows)}"
    details = [broken[0].breaches[0].detail] if len(rows) == 1 else []
    return with_note(styled("broken", head), *(f"{name}: no" for name in names), *details)


def _breach_text(row: Row) -> Text:
    notes = [f"{breach.detail}" for breach in row.breaches[:1]]
    return with_note(styled("broken", "; ".join(f"{breach.name}: no" for breach in row.breaches)), *notes)


# Contests


def _patterns(summary: Summary, found: Recommendation, names: _Names) -> str:
    contests = [contest for contest in summary.contests if contest.kind == "patterns"]
    if not contests:
        return paragraph("No contest between patterns was run.")
    if not any(row.speed for contest in contests for row in contest.rows):
        return paragraph("Nothing was measured: the patterns were only checked, or all of them are broken.")
    parts = [
        paragraph(
            "Under each worker pool, all patterns on the same workload. The reference is celery-alchemy with the "
            "strategy "
            "auto: a ratio above 1 means more of it than celery-alchemy. Losses of ours are printed as the wins are."
        ),
        standings_table(found.standings),
    ]
    for pool in dict.fromkeys(contest.pool for contest in contests):
        parts.append(f"<h3>{html.escape(pool)}</h3>")
        own = [contest for contest in contests if contest.pool == pool]
        for contest in own:
            opened = contest is contests[0]
            parts.append(folded(f"{contest.workload}: {_outcome(contest)}", _contest(contest, names), opened))
    return "".join(parts)


def standings_table(standings: Sequence[Standing]) -> str:
    """Return how each pattern stands against ours."""

    def tally(standing: Standing, metric: str) -> str:
        one = standing.tallies[metric]
        if not one.contests:
            return "-"
        better, worse = ("faster", "slower") if metric == "goodput" else ("cheaper", "dearer")
        return f"{one.better} {better}, {one.worse} {worse}, {one.neither} neither"

    def middle(standing: Standing, metric: str) -> str:
        one = standing.tallies[metric]
        return f"{factor(one.middle)} ({factor(one.least)} to {factor(one.most)})" if one.contests else "-"

    rows: list[Sequence[Content]] = [
        (
            standing.pattern,
            with_note(styled("broken", f"{standing.broken} of {standing.cells}"), listed(standing.broken_under))
            if standing.broken
            else styled("ok", f"0 of {standing.cells}"),
            tally(standing, "goodput"),
            middle(standing, "goodput"),
            tally(standing, "cpu"),
            middle(standing, "cpu"),
            middle(standing, "database_cpu"),
        )
        for standing in standings
    ]
    columns = (
        "pattern",
        "broken",
        "goodput: contests",
        "goodput: mean ratio (range)",
        "worker CPU per task: contests",
        "worker CPU: mean ratio (range)",
        "database CPU: mean ratio (range)",
    )
    caption = "Each pattern against celery-alchemy with auto, over all worker pools and workloads where it is right"
    return table(caption, columns, rows)


def _outcome(contest: ContestSummary) -> str:
    rows = [row for row in contest.rows if not row.arm.copy and not row.reference]
    words = []
    for verdict in ("faster", "slower"):
        if n := sum((one := row.ratio("goodput")) is not None and one.verdict == verdict for row in rows):
            words.append(f"{n} {verdict}")
    if level := sum((one := row.ratio("goodput")) is not None and not one.shown for row in rows):
        words.append(f"no difference shown in {level}")
    if broken := sum(row.broken for row in contest.rows):
        words.append(f"{broken} broken")
    return ", ".join(words) or "nothing to compare"


def _contest(contest: ContestSummary, names: _Names) -> str:
    parts = [paragraph(contest.note, "bad")] if contest.note else []
    chart = charts.forest(contest, names.next())
    if chart:
        parts.append(scroll(chart, f"Forest plot of {contest.name}"))
    else:
        parts.append(paragraph("There is no ratio to draw."))
    parts.append(_contest_table(contest))
    flags = [f"{row.arm.label}, {where(row.arm)}: {flag}." for row in contest.rows for flag in row.flags]
    if flags:
        parts.append(folded(f"{count(len(flags), 'flag')}: read these rows with care", bullets(flags)))
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
    name = row.arm.label if contest.kind == "patterns" else where(row.arm)
    took = f"strategy: {row.strategy}" if row.strategy and row.strategy != row.arm.strategy else ""
    flagged = "flagged, see below" if row.flags else ""
    head = with_note(name, "the reference" if row.reference else "", took, flagged)
    if row.broken:
        said = with_note(styled("broken", "broken"), f"{row.breaches[0].name}: no")
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
    good = {"faster": "good", "cheaper": "good", "slower": "bad", "dearer": "bad"}.get(found.verdict, "muted")
    value = with_note(
        f"{factor(found.estimate.median)} {interval(found.estimate)}", f"n = {found.estimate.n}; {batches}"
    )
    return value, with_note(styled(good, found.verdict), found.reason)


def _pools(summary: Summary, names: _Names) -> str:
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


# Sweeps


def _by_workload(sweeps: Iterable[SweepSummary]) -> Iterator[tuple[str, list[SweepSummary]]]:
    found: dict[str, list[SweepSummary]] = {}
    for sweep in sweeps:
        found.setdefault(sweep.workload, []).append(sweep)
    yield from found.items()


def _latency(summary: Summary, names: _Names) -> str:
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
            str(step.latency.n if step.latency else 0), str(step.failed), str(step.unanswered), number(step.worker_cpus),
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


def _throughput(summary: Summary, names: _Names) -> str:
    if not summary.sweeps:
        return paragraph("No sweep was run, so it is not known.")
    parts = [
        paragraph(
            f"The highest rate offered at which {summary.facts.objective} held, no task failed, and what was "
            f"offered was "
            "achieved. Each comes from one sweep and has no interval."
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


# Connections, memory, phases


def _compared(summary: Summary) -> list[ContestSummary]:
    """Return the contests between worker pools; without them, those between patterns."""
    pools = [contest for contest in summary.contests if contest.kind == "pools"]
    return pools or [contest for contest in summary.contests if contest.kind == "patterns"]


def _connections(summary: Summary, names: _Names) -> str:
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


def _memory(summary: Summary, names: _Names) -> str:
    chart = charts.memory(_compared(summary), names.next())
    if not chart:
        return paragraph("Memory was not measured, or none of the arms is right.")
    return paragraph(
        "Proportional set size: memory that processes share is counted once, in shares. The median over the workloads."
    ) + scroll(chart, "Memory by worker pool")


def _phases(summary: Summary, names: _Names) -> str:
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


def _round_trips(summary: Summary) -> str:
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


def _errors(summary: Summary) -> str:
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
            f"{contest.name}, {where(row.arm)} {row.arm.label}: the end of the worker's log", f"<pre>{_tail(row)}</pre>"
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


# Recommendation


def _recommendation(found: Recommendation) -> str:
    parts = []
    if found.overall:
        parts += ["<h3>Over all workloads</h3>", _advice(found.overall), _evidence(found.overall)]
    checked = [check for check in found.automatic if check.took]
    if checked:
        words = {True: styled("good", "yes"), False: styled("bad", "no"), None: styled("muted", "not known")}
        rows: list[list[Content]] = [
            [check.pool, check.took, words[check.agrees], check.evidence[0]] for check in checked
        ]
        columns = ("worker pool", "auto takes", "is that what the evidence says?", "because")
        parts += ["<h3>Does auto choose what the evidence says?</h3>", table("auto, by worker pool", columns, rows)]
        more = [line for check in checked for line in check.evidence[1:]]
        if more:
            parts.append(folded("Where a difference is shown", bullets(more)))
    if found.workloads:
        parts.append("<h3>By workload</h3>")
    for advice in found.workloads:
        choice = "; ".join(f"{one.topic}: {one.choice}" for one in advice.advice)
        inner = _advice(advice.advice) + _evidence(advice.advice)
        if advice.losses:
            inner += "<h3>What speaks against it</h3>" + bullets(advice.losses)
        if advice.wins:
            inner += "<h3>What speaks for it</h3>" + bullets(advice.wins)
        parts.append(folded(Text(f"<b>{html.escape(advice.workload)}</b> {html.escape(choice)}"), inner))
    if not parts:
        parts.append(paragraph("Nothing was measured, so nothing is recommended."))
    return "".join(parts) + "<h3>How far it holds</h3>" + bullets(found.limits)


def _advice(found: Sequence[Advice]) -> str:
    boxes = "".join(
        f'<div><span class="small muted">{html.escape(one.topic)}</span><b>{html.escape(one.choice)}</b></div>'
        for one in found
    )
    return f'<div class="advice">{boxes}</div>'


def _evidence(found: Sequence[Advice]) -> str:
    return "".join(
        folded(
            f"{one.topic}: evidence and limits",
            bullets(one.evidence) + (paragraph("What would change it:") + bullets(one.limits) if one.limits else ""),
        )
        for one in found
    )


def _raw(summary: Summary, directory: Path) -> str:
    what = {
        RUN_FILE: "what was run, on what, with what",
        BATCHES_FILE: "every slice and every verdict, one line for each batch",
        SWEEP_FILE: "every step of the sweeps",
        ROUND_TRIPS_FILE: "round trips per task",
        SUMMARY_FILE: "the numbers of this page",
        TASKS_DIRECTORY: "every single task, as CSV",
    }
    items = [
        Text(f'<a href="{name}{"/" if name == TASKS_DIRECTORY else ""}">{name}</a>: {html.escape(meaning)}')
        for name, meaning in what.items()
        if (directory / name).exists() or name == SUMMARY_FILE
    ]
    return (
        paragraph("This was run:")
        + f'<pre tabindex="0">{html.escape(summary.facts.command)}</pre>'
        + paragraph("Everything here is computed from the files beside this page:")
        + bullets(items)
        + paragraph(
            Text("<code>celery alchemy bench report DIRECTORY</code> writes this page again, <code>celery alchemy bench "
                 "compare A B</code> compares two such directories.")
        )
    )  # fmt: skip
