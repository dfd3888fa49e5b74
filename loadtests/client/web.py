"""A "Sessions" tab for Locust's web page."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ..percentiles import Percentiles
from .helper import Helper
from .records import LATENCY, PHASES
from .runs import Run

KEY = "sessions"
TAB = {"title": "Sessions", "key": KEY}
TABLE = {
    "key": KEY,
    "structure": [
        {"key": "name", "title": "What"},
        {"key": "value", "title": "Value"},
        {"key": "n", "title": "n"},
        {"key": "p50", "title": "p50 (ms)"},
        {"key": "p95", "title": "p95 (ms)"},
        {"key": "p99", "title": "p99 (ms)"},
        {"key": "max", "title": "max (ms)"},
    ],
}
LABELS = {
    "connections": "Connections",
    "peak_connections": "Connections, at most",
    "promised_connections": "Connections, promised",
    "idle_in_transaction": "Idle in transaction",
    "peak_idle_in_transaction": "Idle in transaction, at most",
    "worker_alive": "Worker is running",
}
BLANK = {"value": "", "n": "", "p50": "", "p95": "", "p99": "", "max": ""}
PATH = "/stats/requests"


def add_sessions_tab(web_ui: Any, run: Run, helper: Helper) -> None:
    """Show connections, units of work and phases, refreshed with the statistics."""
    from flask import Response, request

    web_ui.template_args |= {"extended_tabs": [TAB], "extended_tables": [TABLE]}

    def extend(response: Response) -> Response:
        if request.path.endswith(PATH) and response.is_json:
            stats = [{"key": KEY, "data": sessions_table(run, helper.sample)}]
            response.set_data(json.dumps({**response.get_json(), "extended_stats": stats}))
        return response

    web_ui.app.after_request(extend)


def sessions_table(run: Run, sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the tab."""
    counts = run.records.counts
    facts = [(label, sample[key]) for key, label in LABELS.items() if sample.get(key) is not None]
    facts += [
        ("Units of work ended", counts["attempts"]),
        ("Tasks succeeded", counts["succeeded"]),
        ("Tasks failed", counts["failed"]),
        ("Successful tasks per second", round(run.records.goodput_per_s, 1)),
    ]
    rows = [{**BLANK, "name": label, "safe_name": label, "value": value} for label, value in facts]
    for phase in (LATENCY, *PHASES):
        if found := Percentiles.of(run.records.values(phase)):
            rows.append({**BLANK, "name": phase, "safe_name": phase, **asdict(found)})
    return rows
