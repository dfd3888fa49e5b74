"""What a result directory says: statistics, recommendation, page, terminal summary and comparison.

Everything here is computed from the file that `bench/results.py` describes, and from nothing else: `summary` sums the
rows up, `statistics` says what may be claimed, `recommendation` applies one rule, `tables` makes every
table once; `terminal` (with `charts`) draws them.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from .charts import demo, forest, standalone
from .histogram import write_histograms
from .recommendation import recommend
from .summary import Row, Standing, summarise
from .terminal import markdown, page, print_summary


def write_report(console: Console, directory: Path) -> list[Path]:
    """Print the summary of a result directory, write its report, and return the paths of what was written.

    Raises:
        NoRunError: There is no run in it.
    """
    summary = summarise(directory)
    found = recommend(summary)
    written = write_histograms(directory, summary.sweeps)
    for name, text in (("index.html", page(summary, found)), ("summary.md", markdown(summary, found))):
        (directory / name).write_text(text, encoding="utf-8")
        written.append(directory / name)
    print_summary(console, summary, found)
    return written


def write_chart(directory: Path, contest: str, path: Path) -> None:
    """Write a picture as an SVG file of its own: `demo`, or the ratios of a contest or of `patterns/<worker pool>`.

    Raises:
        LookupError: There is no such contest, or it has nothing to draw.
    """
    summary = summarise(directory)
    known: dict[str, list[Row | Standing]] = {}
    for standing in summary.standings:
        known.setdefault(f"patterns/{standing.pool}", []).append(standing)
    known |= {one.name: list(one.rows) for one in summary.contests}
    if contest not in {*known, "demo"}:
        raise LookupError(f"{contest!r} is not a contest of {directory}. Known: {', '.join(known) or 'none'}.")
    kind = contest.partition("/")[0]
    drawn = demo(summary, "chart") if contest == "demo" else forest(contest, kind, known[contest], "chart")
    if drawn is None:
        raise LookupError(f"{contest} has nothing to draw.")
    path.write_text(standalone(drawn), encoding="utf-8")
