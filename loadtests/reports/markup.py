"""Pieces of HTML that the page is put together from."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Markup that is not escaped again."""

    html: str


Content = str | Text


class ChartNames:
    """Gives each chart a name of its own: the ids in it must not be those of another."""

    def __init__(self) -> None:
        self._count = 0

    def next(self) -> str:
        """Return a name that was not returned before."""
        self._count += 1
        return f"chart{self._count}"


def escape(content: Content) -> str:
    """Return the markup of some content."""
    return content.html if isinstance(content, Text) else html.escape(content)


def styled(style: str, content: Content) -> Text:
    """Return content in a span of a class."""
    return Text(f'<span class="{style}">{escape(content)}</span>')


def with_note(content: Content, *notes: str) -> Text:
    """Return content with smaller lines below it."""
    below = "".join(f"<small>{html.escape(note)}</small>" for note in notes if note)
    return Text(f"{escape(content)}{below}")


def paragraph(content: Content, style: str = "") -> str:
    """Return a paragraph."""
    return f"<p{_class(style)}>{escape(content)}</p>"


def bullets(items: Iterable[Content], style: str = "") -> str:
    """Return a list; nothing if it is empty."""
    inner = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul{_class(style)}>{inner}</ul>" if inner else ""


def scroll(inner: str, label: str) -> str:
    """Return a box that wide content scrolls in, with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{html.escape(label, quote=True)}">{inner}</div>'


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Content]], numeric: Iterable[int] = ()) -> str:
    """Return a table in a scrolling box; the first cell of each row is its head.

    Args:
        numeric: Numbers of the columns, from 0, that are aligned to the right.
    """
    right = set(numeric)

    def style(place: int) -> str:
        return ' class="n"' if place in right else ""

    head = "".join(f'<th scope="col"{style(place)}>{html.escape(name)}</th>' for place, name in enumerate(columns))
    body = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{style(place)}>{escape(cell)}</td>" for place, cell in enumerate(row) if place)
        + "</tr>\n"
        for row in rows
    )
    inner = (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    )
    return scroll(inner, caption)


def folded(summary: Content, inner: str, opened: bool = False) -> str:
    """Return content that is shown when it is asked for; no script is needed for it."""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>\n{inner}</details>\n"


def section(anchor: str, title: str, *parts: str) -> str:
    """Return a section of the page."""
    return f'<section id="{anchor}"><h2>{html.escape(title)}</h2>\n{"".join(parts)}</section>\n'


def _class(style: str) -> str:
    return f' class="{style}"' if style else ""
