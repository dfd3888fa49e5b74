"""A "Sessions" tab for Locust's web page."""

from __future__ import annotations

import json
from typing import Any

from ..errors import LoadTestError
from .lines import LineProcess
from .run import REQUEST_TYPE, goodput_per_s, merged

KEY = "sessions"
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
COLUMNS = {
    "name": "What",
    "value": "Value",
    "n": "n",
    **{name: f"{name} (ms)" for name in PERCENTILES},
    "max": "max (ms)",
}
SAMPLE_S = 5.0


def add_sessions_tab(web_ui: Any, statistics: Any, helper: LineProcess) -> None:
    """Show connections, tasks and phases, refreshed with the statistics."""
    from flask import Response, request

    table = {"key": KEY, "structure": [{"key": key, "title": title} for key, title in COLUMNS.items()]}
    web_ui.template_args |= {"extended_tabs": [{"title": "Sessions", "key": KEY}], "extended_tables": [table]}

    def extend(response: Response) -> Response:
        if request.path.endswith("/stats/requests") and response.is_json:
            try:
                sample = helper.ask(SAMPLE_S, sample=True)
            except LoadTestError as error:
                sample = {"Worker": str(error)}
            extended = [{"key": KEY, "data": sessions_table(statistics, sample)}]
            response.set_data(json.dumps({**response.get_json(), "extended_stats": extended}))
        return response

    web_ui.app.after_request(extend)


def sessions_table(statistics: Any, sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the tab."""
    tasks = merged(statistics)
    facts = {
        **sample,
        "Tasks succeeded": tasks.num_requests - tasks.num_failures,
        "Tasks failed": tasks.num_failures,
        "Successful tasks per second": round(goodput_per_s(tasks), 1),
    }
    rows: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in facts.items()]
    for method in (REQUEST_TYPE, "queue", "checkout", "database", "run"):
        entry = merged(statistics, method)
        if measured := entry.num_requests - entry.num_none_requests:
            found = {name: entry.get_response_time_percentile(percent) for name, percent in PERCENTILES.items()}
            name = "latency" if method == REQUEST_TYPE else method
            rows.append({"name": name, "n": measured, **found, "max": round(entry.max_response_time, 2)})
    return [{**dict.fromkeys(COLUMNS, ""), **row, "safe_name": row["name"]} for row in rows]
