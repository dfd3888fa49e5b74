"""From a matplotlib figure to SVG that belongs into a page: text as text, colours from the page, ids of its own."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .style import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
"""Not colours: each is replaced by a variable of the page, which knows light from dark."""
SERIES = ("#050501", "#050502", "#050503", "#050504", "#050505")
GOOD, BAD, BAND = "#060601", "#060602", "#060603"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
    GOOD: "--good",
    BAD: "--bad",
    BAND: "--band",
}
UNITS_PER_INCH = 72
"""SVG of matplotlib counts in points; one point is drawn as one CSS pixel."""


@contextmanager
def drawing() -> Iterator[None]:
    """Set matplotlib up for our SVG, in this block only, without its global state of figures."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "celery-alchemy",
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "axes.labelsize": 12,
        "axes.titlesize": 13,
        "xtick.labelsize": 11.5,
        "ytick.labelsize": 12,
        "legend.fontsize": 11.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": GRID,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.linewidth": 1.2,
        "text.parse_math": False,
    }
    with mpl.rc_context(settings):
        yield


def figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many CSS pixels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08)
    return Figure(figsize=(width / UNITS_PER_INCH, height / UNITS_PER_INCH), layout=layout)


def to_svg(drawn: Figure, name: str, label: str) -> str:
    """Return the figure as an `<svg>` element.

    Args:
        name: Prefix of the ids in it, unique in the page; letters, digits and `-`.
        label: What the chart shows, for those who do not see it.
    """
    out = io.StringIO()
    drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # It would hold for the whole page; the page has the same rule for its charts.
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'((?:xlink:)?href)="#', rf'\1="#{name}-', text).replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    width = float(drawn.get_figwidth() * UNITS_PER_INCH)
    said = html.escape(label, quote=True)
    head = (
        f'<svg class="chart" role="img" aria-label="{said}" style="max-width:{width:.0f}px;'
        f'min-width:{width * 0.82:.0f}px" '
    )
    text = re.sub(r"\s(?:width|height)=\"[\d.]+pt\"", "", text, count=2)
    # The page's own font: what was measured with is a wide one, so there is room.
    text = re.sub(r"font-family: [^;\"]*;?\s*", "", text)
    text = text.replace("<svg ", head, 1)
    start = text.index(">") + 1
    return re.sub(r"\n\s*", "\n", f"{text[:start]}<title>{said}</title>{text[start:]}").strip()


def standalone(chart: str) -> str:
    """Return a chart of `to_svg` as a file of its own: it brings the colours, for light and dark, and its size."""
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', chart)[0]
    chart = re.sub(r' style="max-width[^"]*"', f' width="{width}" height="{height}"', chart, count=1)
    start = chart.index(">") + 1
    font = 'text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }'
    return f"{chart[:start]}<style>{COLOURS}{font}</style>{chart[start:]}\n"
