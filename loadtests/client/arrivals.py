"""When tasks arrive, if nobody waits for the worker."""

from __future__ import annotations

import random
from collections.abc import Iterator

ARRIVALS = ("poisson", "constant")
"""Independent arrivals at a mean rate, as of many people; or one after the other at equal distances."""


def gaps(rate_per_s: float, arrival: str, rng: random.Random) -> Iterator[float]:
    """Yield the seconds from one arrival to the next, without end."""
    while True:
        yield rng.expovariate(rate_per_s) if arrival == "poisson" else 1 / rate_per_s
