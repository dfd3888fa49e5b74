"""Tables in the terminal, and what stands below them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

PACKAGES = ("celery", "sqlalchemy", "psycopg", "celery-alchemy")


def print_table(console: Console, title: str, headings: list[str], lines: list[list[str]]) -> None:
    """Print a table whose first column is text, and the others numbers."""
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def median_interval(ordered: list[float]) -> tuple[float, float]:
    """Return the 95 % sign-test interval of the median of `ordered` values."""
    count = len(ordered)
    low = max(0, int(count / 2 - 0.98 * count**0.5))
    return ordered[low], ordered[count - 1 - low]


def hardware(packages: tuple[str, ...] = PACKAGES) -> str:
    """Name the processor and the versions that a number depends on."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {versions}; {os.cpu_count()} processors, {platform.machine()}."
