"""The diagnosis, for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import click

from .examine import Diagnosis
from .findings import Finding
from .static import Reading

_COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}


def lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield the lines of the report for a terminal."""
    pool = diagnosis.worker_pool
    yield f"worker pool {pool.name}, concurrency {pool.concurrency}"
    for name, described in diagnosis.strategies.items():
        yield f"database {name}: {described}"
    for demand in diagnosis.demands:
        yield f"database {demand.database}: {demand}"
    yield from _findings(diagnosis.findings)


def reading_lines(reading: Reading) -> Iterator[str]:
    """Yield the lines of the report on source files."""
    yield str(reading)
    yield from _findings(reading.findings)


def _findings(findings: list[Finding]) -> Iterator[str]:
    for finding in findings:
        yield ""
        where = f" [{finding.where}]" if finding.where else ""
        yield f"{click.style(finding.level, fg=_COLORS[finding.level], bold=True)} {finding.code}{where}"
        yield f"  {finding.what}"
        if finding.remedy:
            yield f"  -> {finding.remedy}"
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    yield ""
    yield ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())


def as_json(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as a JSON object."""
    return json.dumps(
        {
            "worker_pool": diagnosis.worker_pool.name,
            "concurrency": diagnosis.worker_pool.concurrency,
            "databases": {
                demand.database: {
                    "strategy": diagnosis.strategies[demand.database],
                    "connections_each_process": demand.each,
                    "processes_each_worker": demand.processes,
                    "workers": demand.workers,
                    "connections": demand.total,
                }
                for demand in diagnosis.demands
            },
            "findings": [asdict(finding) for finding in diagnosis.findings],
        },
        indent=2,
    )


def reading_as_json(reading: Reading) -> str:
    """Return the report on source files as a JSON object."""
    said = {"path": reading.where, "files": reading.files, "worker_pools": reading.pools, "found": reading.counts}
    return json.dumps({**said, "findings": [asdict(finding) for finding in reading.findings]}, indent=2)
