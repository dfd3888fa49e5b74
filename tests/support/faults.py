"""How much the fault tests do: a short form in `make test`, all of it in `make test-faults`."""

import os
from typing import TypeVar

T = TypeVar("T")

FULL = os.environ.get("CELERY_ALCHEMY_FAULTS") == "full"
"""Thousands of times, in minutes instead of seconds."""
SEED = int(os.environ.get("CELERY_ALCHEMY_SEED", "20261125"))
"""Of all randomness; printed where a test fails."""


def amount(short: T, full: T) -> T:
    """Return how much to do: `short` in `make test`, `full` in `make test-faults`."""
    return full if FULL else short
