"""What a result directory says: statistics, recommendation, page, terminal summary and comparison.

Everything here is computed from the files that `bench/results.py` describes, and from nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def write_report(console: Console, directory: Path) -> list[Path]:
    """Print the summary of a result directory, write its report, and return the paths of what was written."""
    from .markdown import MARKDOWN_FILE, markdown
    from .page import PAGE_FILE, page
    from .reading import summarise, write_json
    from .recommendation import recommend
    from .terminal import print_summary_of

    summary = summarise(directory)
    found = recommend(summary)
    written = [write_json(directory, summary)]
    for name, text in ((PAGE_FILE, page(summary, found, directory)), (MARKDOWN_FILE, markdown(summary, found))):
        path = directory / name
        path.write_text(text, encoding="utf-8")
        written.append(path)
    print_summary_of(console, summary, found)
    return written


def write_chart(directory: Path, contest: str, path: Path) -> None:
    """Write the forest plot of one contest as an SVG file of its own.

    Raises:
        LookupError: There is no such contest, or it has no ratio to draw.
    """
    from .charts import forest
    from .reading import summarise
    from .svg import standalone

    summary = summarise(directory)
    found = summary.contest(contest)
    if found is None:
        known = ", ".join(one.name for one in summary.contests) or "none"
        raise LookupError(f"{contest!r} is not a contest of {directory}. Known: {known}.")
    drawn = forest(found, "chart")
    if drawn is None:
        raise LookupError(f"{contest} has no ratio to draw.")
    path.write_text(standalone(drawn), encoding="utf-8")
