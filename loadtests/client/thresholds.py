"""Limits that a run must keep, and the exit code if it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..percentiles import nearest_rank
from .records import LATENCY, Records

EXIT_BREACH = 3
EXIT_BROKEN = 1


@dataclass(frozen=True, slots=True)
class Thresholds:
    """None: no limit."""

    p95_ms: float | None = None
    p99_ms: float | None = None
    ratio: float | None = None
    """Failed tasks among all."""
    goodput_per_s: float | None = None
    """Successful tasks per second, at least."""

    @classmethod
    def of(cls, options: Any) -> Thresholds:
        """Return what the command line says."""
        # Locust as a library has no options.
        limits = (getattr(options, f"fail_{name}", None) for name in ("p95", "p99", "ratio", "goodput"))
        return cls(*limits)

    @property
    def given(self) -> bool:
        """Whether there is any limit."""
        return self != Thresholds()

    def breaches(self, records: Records) -> list[str]:
        """Return a sentence for each limit that was not kept. Without a single successful task no latency is kept."""
        ordered = sorted(records.values(LATENCY))
        found = []
        for percent, limit in ((95, self.p95_ms), (99, self.p99_ms)):
            value = nearest_rank(ordered, percent)
            if limit is not None and (math.isnan(value) or value > limit):
                shown = "unknown, for no task succeeded" if math.isnan(value) else f"{value:.2f} ms"
                found.append(f"--fail-p{percent}: the p{percent} latency is {shown}; the limit is {limit:g} ms.")
        if self.ratio is not None and (records.fail_ratio > self.ratio or not records.counts["ended"]):
            found.append(
                f"--fail-ratio: {records.counts['failed']} of {records.counts['ended']} tasks failed "
                f"({records.fail_ratio:.4f}); the limit is {self.ratio:g}."
            )
        if self.goodput_per_s is not None and records.goodput_per_s < self.goodput_per_s:
            found.append(
                f"--fail-goodput: {records.goodput_per_s:.1f} successful tasks per second; "
                f"the limit is {self.goodput_per_s:g}."
            )
        return found
