"""The report as one page that needs nothing but a browser: no script, no network, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..bench.results import Objective
from . import charts, tables
from .recommendation import RULE, UNDECIDED, Choice
from .statistics import ENOUGH
from .summary import Summary
from .tables import Table
from .wording import listed

PAGE_FILE = "index.html"
LEAD = (
    "Real workers were started under each worker pool with each way to give a task its Session, on a real database and "
    "broker, and were given the same tasks. First it was checked whether the results are right; only where they are, "
    "speed was measured, in turns of about a second, each compared with the reference in the same round."
)
DEMO_LEAD = (
    "The same orders (transfers under row locks, retries, failures) were given twice to real workers: once with the "
    "DatabaseTask that people copy from the web, once with celery-alchemy. Then every order was looked up in the "
    "database."
)
INTERVALS = (
    "Ratios are the arm's number divided by the reference's of the same round. In brackets: the 95 % interval of a "
    "bootstrap that draws workers (restarts) first, then their rounds; there is none for fewer than "
    f"{ENOUGH} workers. A difference is claimed only where the interval leaves out 1 and the ratio is beyond the A/A "
    "floor: what identical arms differed by. Whatever broke an invariant shows no speed: broken arms look fast."
)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page; it is left out where it has neither chart nor table."""

    anchor: str
    title: str
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    charts: Sequence[str | None] = ()  # Those that have something to show
    text: str = ""
    tight: bool = False  # Whether its tables must fit a telephone without scrolling


def page(summary: Summary, found: Sequence[Choice]) -> str:
    """Return the whole page."""
    from jinja2 import Environment, PackageLoader

    only_demo = {one.kind for one in summary.contests} == {"demo"} and not summary.sweeps
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        title="Does the order come out right?" if only_demo else "Sessions in Celery workers, under load",
        lead=DEMO_LEAD if only_demo else LEAD,
        short=short(summary, found),
        sections=[one for one in _sections(summary, found) if one.tables or one.folded or any(one.charts)],
        colours=charts.COLOURS.read_text(encoding="utf-8"),
    )


def short(summary: Summary, found: Sequence[Choice]) -> list[str]:
    """Return what someone who was not there wants to know first."""
    chosen: dict[str, dict[str, list[str]]] = {}
    for one in found:
        said = UNDECIDED if one.choice.startswith(UNDECIDED) else one.choice.partition(" (")[0]
        chosen.setdefault(one.topic, {}).setdefault(said, []).append(one.subject)
    lines = [
        f"{topic}: {'; '.join(f'{choice} {listed(subjects)}'.strip() for choice, subjects in by_choice.items())}."
        for topic, by_choice in chosen.items()
    ]
    nothing = ["Nothing was measured, so nothing is recommended."]
    demo = tables.demo_in_short(summary)
    return [*demo, *([] if demo else [tables.correctness(summary)]), *(lines or nothing), *summary.flags]


def _sections(summary: Summary, found: Sequence[Choice]) -> list[Section]:
    of = summary.facts
    objective = Objective.parse(of.objective) if of.objective else None
    standings = {
        pool: [one for one in summary.standings if one.pool == pool]
        for pool in dict.fromkeys(one.pool for one in summary.standings)
    }
    ratios = [charts.forest(f"{pool}, over all workloads", "", rows, f"all-{pool}") for pool, rows in standings.items()]
    between, orders = summary.of_kind("pools"), charts.demo(summary, "demo")
    loads = [
        charts.load(name, [one for one in summary.sweeps if one.workload == name], objective, f"load-{place}")
        for place, name in enumerate(dict.fromkeys(one.workload for one in summary.sweeps))
    ]
    return [
        Section("demo", "The same work, twice", tables.demo(summary), charts=[orders], tight=True),
        Section("choose", "What to choose", tables.choices(found), text=RULE),
        Section(
            "patterns", "Session patterns compared", tables.standings(summary), _contests(summary, "patterns"), ratios,
            INTERVALS,
        ),
        Section(
            "pools", "Worker pools compared", (), _contests(summary, "pools"),
            [charts.forest(one.name, one.kind, one.rows, f"pools-{place}") for place, one in enumerate(between)],
        ),
        Section("open-load", "Open load", tables.open_loads(summary), charts=loads),
        Section("wrong", "What did not hold", (), tables.breaches(summary)),
        Section("phases", "Where the time goes", (), tables.phases(summary)),
        Section("round-trips", "Round trips", tables.round_trips(summary)),
        Section("noise", "Noise", (), tables.noise(summary)),
        Section("facts", "Environment and commands", (), tables.facts(summary)),
    ]  # fmt: skip


def _contests(summary: Summary, kind: str) -> list[Table]:
    return [table for one in summary.of_kind(kind) for table in tables.contest(one)]
