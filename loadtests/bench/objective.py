"""The latency that must hold, and whether it does."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..client.percentiles import Percentiles


@dataclass(frozen=True, slots=True)
class Objective:
    """What users are promised: a latency percentile and its limit."""

    percentile: str
    """`p50`, `p95` or `p99`."""
    limit_ms: float

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Return the objective behind `p95=50ms` or `p99=0.2s`.

        Raises:
            ValueError: It is not spelled like that.
        """
        match = re.fullmatch(r"(p50|p95|p99)=(\d+(?:\.\d+)?)(ms|s)", text.strip())
        if not match or not float(match[2]):
            raise ValueError(f"{text!r} is not a latency objective: write for example p95=50ms.")
        return cls(match[1], float(match[2]) * (1000 if match[3] == "s" else 1))

    def met(self, latency: Percentiles | None) -> bool:
        """Return whether the percentile is within the limit."""
        return latency is not None and float(getattr(latency, self.percentile)) <= self.limit_ms

    def __str__(self) -> str:
        return f"{self.percentile}={self.limit_ms:g}ms"
