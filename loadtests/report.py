"""What the demo found, for the terminal and as a page to keep."""

from __future__ import annotations

import html
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .cells import ACCOUNTS, CellResult

EXPLANATION = (
    "Each worker pool ran a real `celery worker` on a database of its own and moved money between "
    f"{ACCOUNTS} accounts: both rows locked, two ledger lines written. Of ten transfers one commits explicitly, one is "
    "slow, one raises after writing, and one retries after writing.",
    "ok means: the total is conserved; every balance is explained by its ledger lines; each successful transfer has "
    "exactly its two lines and no failed one has any; every transfer was answered once and ended as it was meant to; "
    "no connection was left idle in transaction or checked out; never more connections than the worker promised, and "
    "none outlived it; and the worker stopped when it was told to.",
    "Tasks/s and latency (sent until ended) count successful transfers only, with two in flight for each pool process, "
    "thread or greenlet. They come from one short run: they do not rank worker pools.",
)
LOG_LINES = 15
COLUMNS = (
    ("Worker pool", "left"),
    ("Strategy, and why", "left"),
    ("Tasks/s", "right"),
    ("p50\nms", "right"),
    ("p95\nms", "right"),
    ("Connections:\npeak /\npromised", "right"),
    ("Failures:\nexpected /\nunexpected", "right"),
    ("Verdict", "left"),
)


def environment() -> dict[str, str]:
    """Return what the numbers depend on besides the code."""
    packages = {name: version(name) for name in ("celery-alchemy", "celery", "sqlalchemy", "gevent", "eventlet")}
    return {**packages, "python": platform.python_version(), "machine": f"{platform.system()}, {os.cpu_count()} CPUs"}


def rows(results: Sequence[CellResult]) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row for each worker pool."""
    return [
        (
            result.options.pool,
            f"{result.strategy}\n{result.reason}" if result.strategy else "-",
            _number(result.per_second) if result.sent else "-",
            _number(result.p50_ms),
            _number(result.p95_ms),
            f"{result.peak_connections} / {'-' if (most := result.announced_connections) is None else most}",
            f"{result.expected_failures} / {result.unexpected_failures}",
            "BROKEN" if result.broken else "ok",
        )
        for result in results
    ]


def table(results: Sequence[CellResult]) -> Table:
    """Return the one table."""
    drawn = Table(
        box=box.HORIZONTALS,
        show_lines=True,
        collapse_padding=True,
        show_edge=False,
        pad_edge=False,
        title="Money transfers, by worker pool",
    )
    for name, justify in COLUMNS:
        drawn.add_column(name, justify="right" if justify == "right" else "left")
    for result, (*cells, verdict) in zip(results, rows(results), strict=True):
        drawn.add_row(*cells, f"[bold red]{verdict}[/]" if result.broken else f"[bold green]{verdict}[/]")
    return drawn


def print_report(console: Console, results: Sequence[CellResult]) -> None:
    """Print the table, every invariant that broke, and what was checked."""
    console.print()
    console.print(table(results))
    for result in results:
        if result.strategy and result.sent < result.options.tasks:
            console.print(
                f"{result.options.pool}: sent {result.sent} of {result.options.tasks} transfers, then time was up."
            )
        for check in result.broken:
            console.print(f"[bold red]{result.options.pool}: {check.name}: NO[/]")
            console.print(check.detail, markup=False, highlight=False, soft_wrap=True)
        if result.broken and result.log:
            console.print(f"[bold]The end of the {result.options.pool} worker's log:[/]")
            tail = "\n".join(result.log.splitlines()[-LOG_LINES:])
            console.print(tail, markup=False, highlight=False, soft_wrap=True)
    console.print()
    for paragraph in EXPLANATION:
        console.print(paragraph, markup=False, highlight=False)
        console.print()


def write_report(directory: Path, results: Sequence[CellResult], services: Sequence[str], command: str) -> list[Path]:
    """Write `demo.html`, `demo.json`, and the log of each worker in trouble; return the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    facts = {**environment(), "services": ", ".join(services), "command": command}
    written = [directory / "demo.html", directory / "demo.json"]
    written[0].write_text(_page(results, facts))
    written[1].write_text(
        json.dumps({"environment": facts, "results": [_plain(result) for result in results]}, indent=2)
    )
    for result in results:
        if result.broken and result.log:
            written.append(directory / f"worker-{result.options.pool}.log")
            written[-1].write_text(result.log)
    return written


def _plain(result: CellResult) -> dict[str, Any]:
    plain = asdict(result)
    del plain["log"]
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in plain.items()}


def _number(value: float) -> str:
    """Return three significant digits, which is more than one short run can tell."""
    return "-" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .5rem .6rem; text-align: left; white-space: pre-line; }
th.right, td.right { text-align: right; }
.ok, .broken { font-weight: 600; }
.ok { color: #17733b; }
.broken { color: #b3261e; }
footer { color: #666; font-size: .85rem; }
pre { overflow-x: auto; background: #8882; padding: .8rem; }
"""


def _page(results: Sequence[CellResult], facts: dict[str, str]) -> str:
    escape = html.escape
    sides = [justify for _, justify in COLUMNS]
    head = "".join(f'<th class="{side}">{escape(name)}</th>' for name, side in COLUMNS)
    body = ""
    for result, cells in zip(results, rows(results), strict=True):
        sides[-1] = "broken" if result.broken else "ok"
        body += (
            "<tr>"
            + "".join(f'<td class="{side}">{escape(cell)}</td>' for cell, side in zip(cells, sides, strict=True))
            + "</tr>\n"
        )
    broken = "".join(
        f"<h2>{escape(result.options.pool)}: {escape(check.name)}: no</h2><pre>{escape(check.detail)}</pre>"
        for result in results
        for check in result.broken
    )
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in EXPLANATION)
    footer = "<br>".join(f"{escape(name)}: {escape(value)}" for name, value in facts.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>celery-alchemy: demo</title><style>{STYLE}</style></head><body>
<h1>Money transfers under every worker pool</h1>
<table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table>
{broken}{text}<footer>{footer}</footer></body></html>
"""
