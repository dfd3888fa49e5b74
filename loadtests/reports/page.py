"""The report as one page that needs nothing but a browser: no script, no network, no other file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..bench.results import BATCHES_FILE, ROUND_TRIPS_FILE, RUN_FILE, SWEEP_FILE, TASKS_DIRECTORY
from .automatic import Advice, AutoCheck
from .markup import ChartNames, Content, Text, bullets, escape, folded, paragraph, section, styled, table, with_note
from .page_contests import patterns, pools
from .page_correctness import correctness
from .page_loads import latency, throughput
from .page_resources import connections, errors, memory, phases, round_trips
from .reading import SUMMARY_FILE, summarise
from .recommendation import Recommendation, recommend
from .style import STYLE
from .summary import Summary
from .wording import count, number, percent

PAGE_FILE = "index.html"


def write_page(directory: Path) -> Path:
    """Write `index.html` into a result directory, and return its path."""
    summary = summarise(directory)
    path = directory / PAGE_FILE
    path.write_text(page(summary, recommend(summary), directory), encoding="utf-8")
    return path


def page(summary: Summary, found: Recommendation, directory: Path) -> str:
    """Return the whole page."""
    names = ChartNames()
    sections = [
        ("environment", "Environment and noise floor", _environment(summary)),
        ("correctness", "What was right", correctness(summary)),
        ("patterns", "Session patterns compared", patterns(summary, found, names)),
        ("pools", "Worker pools compared", pools(summary, names)),
        ("latency", "Latency against offered load", latency(summary, names)),
        ("throughput", "Throughput at the objective", throughput(summary, names)),
        ("connections", "Connections", connections(summary, names)),
        ("memory", "Memory", memory(summary, names)),
        ("phases", "Where the time goes", phases(summary, names)),
        ("round-trips", "Round trips", round_trips(summary)),
        ("errors", "Errors", errors(summary)),
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
            ("driver blocks", "While one greenlet waits for the server no other runs: nothing was run."),
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
    flags = bullets(styled("flag", flag) for flag in summary.flags)
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


def _recommendation(found: Recommendation) -> str:
    parts = []
    if found.overall:
        parts += ["<h3>Over all workloads</h3>", _advice(found.overall), _evidence(found.overall)]
    checked = [check for check in found.automatic if check.took]
    if checked:
        words = {True: styled("good", "yes"), False: styled("bad", "no"), None: styled("muted", "not known")}
        rows: list[list[Content]] = [
            [check.pool, check.took, with_note(words[check.agrees], *_said(check)), check.evidence[0]]
            for check in checked
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
    if not found.overall and not found.workloads:
        parts.append(paragraph("Nothing was measured, so nothing is recommended."))
    return "".join(parts) + "<h3>How far it holds</h3>" + bullets(found.limits)


def _said(check: AutoCheck) -> list[str]:
    return ["nothing is shown to be better"] if check.agrees else []


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
            Text(
                "<code>celery alchemy bench report DIRECTORY</code> writes this page again, "
                "<code>celery alchemy bench compare A B</code> compares two such directories."
            )
        )
    )  # fmt: skip
