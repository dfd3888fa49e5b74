"""The report as one page that needs nothing but a browser: no script, no network, no other file."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.results import Objective
from . import charts, tables
from .recommendation import RULE, UNDECIDED, Choice
from .statistics import ENOUGH
from .summary import Summary
from .wording import listed

PAGE_FILE = "index.html"


def page(summary: Summary, found: Sequence[Choice]) -> str:
    """Return the whole page; its sections are those of the template, without those that have nothing to show."""
    from jinja2 import Environment, PackageLoader

    of, pools = summary.facts, dict.fromkeys(one.pool for one in summary.standings)
    objective = Objective.parse(of.objective) if of.objective else None
    standings = {pool: [one for one in summary.standings if one.pool == pool] for pool in pools}
    swept = dict.fromkeys(one.workload for one in summary.sweeps)
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        summary=summary, found=found, short=short(summary, found), rule=RULE, enough=ENOUGH, tables=tables,
        charts=charts,
        ratios=[charts.forest(f"{pool}, over all workloads", "", one, f"all-{pool}") for pool, one in standings.items()],
        between=[
            charts.forest(one.name, one.kind, one.rows, f"pools-{place}")
            for place, one in enumerate(summary.of_kind("pools"))
        ],
        loads=[
            charts.load(name, [one for one in summary.sweeps if one.workload == name], objective, f"load-{place}")
            for place, name in enumerate(swept)
        ],
        colours=charts.COLOURS.read_text(encoding="utf-8"),
    )  # fmt: skip


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
