"""What is committed of the storms in which workers are killed: see `tests/scripts/once_storms.py`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .tables import Table, table
from .terminal import markdown_table

Row = dict[str, Any]
_WAYS = {"ours": 'exactly_once, `"first"`', "ours, last": 'exactly_once, `"last"`'}
_COUNTED = ("kills", "due", "twice", "lost", "lost_by_kombu", "wrong_results", "twice_after", "lost_after")


def read(folder: Path) -> list[Row]:
    """Return the storms of a run, each as it was written down."""
    return [json.loads(line) for line in (folder / "storms.jsonl").read_text().splitlines()]


def said(folder: Path, what: str) -> str:
    """Return what a document says of a run: the number of "kills", those of "ours", or a table of the "ways", of the
    "places" or of the "points"."""
    found = read(folder)
    if what in {"kills", "ours"}:
        return f"{sum(_counts(row)['kills'] for row in (found if what == 'kills' else _ours(found))):,}"
    return f"\n{markdown_table({'ways': by_way, 'places': by_place, 'points': by_point}[what](found))}\n"


def by_way(found: Iterable[Row]) -> Table:
    """Return the sums of each way to keep a task from running twice."""
    sums: dict[str, Counter[str]] = {}
    for row in found:
        way = _WAYS.get(row["setup"]["way"], f"`{row['setup']['way']}`")
        way += ", `async def`" if row["setup"].get("tasks") == "async def" else ""
        sums.setdefault(way, Counter()).update(_counts(row))
    rows = []
    for way, counts in sorted(sums.items(), key=lambda one: ("exactly" in one[0], one[0])):
        after = [str(counts[name]) if "exactly" in way else "" for name in ("twice_after", "lost_after")]
        names = ("kills", "due", "twice", "lost", "lost_by_kombu", "wrong_results")
        rows.append([way, *(f"{counts[name]:,}" for name in names), *after])
    columns = "way | kills | effects due | twice | lost | lost by kombu | results wrong | sent again: twice | lost "
    return table("", columns, rows)[0]


def by_point(found: Iterable[Row]) -> Table:
    """Return the kills of tasks with `exactly_once`, by where they struck."""
    kills: Counter[str] = Counter()
    for row in _ours(found):
        kills.update(row["kills"])
    rows = [[point.removeprefix("at a point: "), f"{number:,}"] for point, number in sorted(kills.items())]
    return table("", "killed | times", rows)[0]


def by_place(found: Iterable[Row]) -> Table:
    """Return the kills of tasks with `exactly_once`, by worker pool, broker and database."""
    sums: dict[tuple[str, ...], Counter[str]] = {}
    places = [(broker, database) for broker in ("redis", "rabbitmq") for database in ("postgresql", "mariadb")]
    for setup, row in ((row["setup"], row) for row in _ours(found)):
        sums.setdefault((setup["pool"], setup["broker"], setup["database"]), Counter()).update(_counts(row))
    pools = dict.fromkeys(pool for pool, *_ in sums)
    rows = [[pool, *(f"{sums[(pool, *place)]['kills']}" if (pool, *place) in sums else "" for place in places)]
            for pool in sorted(pools)]  # fmt: skip
    names = {"redis": "Redis", "rabbitmq": "RabbitMQ", "postgresql": "PostgreSQL", "mariadb": "MariaDB"}
    columns = " | ".join(["worker pool", *(f"{names[broker]}, {names[database]}" for broker, database in places)])
    return table("", columns, rows)[0]


def _ours(found: Iterable[Row]) -> list[Row]:
    return [row for row in found if row["setup"]["way"] in _WAYS]


def _counts(row: Row) -> dict[str, int]:
    return {name: sum(row[name].values()) if name == "kills" else int(row[name]) for name in _COUNTED}
