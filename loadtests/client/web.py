"""A "Sessions" tab for Locust's web page."""

from __future__ import annotations

import json
from typing import Any

from ..errors import LoadTestError
from .lines import LineProcess
from .run import PERCENTILES, goodput_per_s, merged, phases

KEY = "sessions"
COLUMNS = {"name": "What", "value": "Value", "n": "n", **{one: f"{one} (ms)" for one in (*PERCENTILES, "max")}}
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
    rows = [*({"name": name, "value": value} for name, value in facts.items()), *phases(statistics)]
    return [{**dict.fromkeys(COLUMNS, ""), **row, "safe_name": row["name"]} for row in rows]
