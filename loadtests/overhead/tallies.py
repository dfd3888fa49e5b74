"""What a task does, counted by Python itself: calls, and blocks of memory. The same on every run of one version."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypedDict


class Tally(TypedDict):
    """Per task."""

    calls: float
    """Calls of functions, those written in C included."""
    blocks: float
    """Blocks of memory allocated, as far as one sees who looks at each call and each return: what is freed before the
    next look is not seen, nor what comes out of a free list."""


def count(run: Callable[[], object], tasks: int) -> Tally:
    """Return the medians of so many runs."""
    calls, blocks = zip(*(_count(run) for _ in range(tasks)), strict=True)
    return Tally(calls=statistics.median(calls), blocks=statistics.median(blocks))


def _count(run: Callable[[], object]) -> tuple[int, int]:
    calls = risen = 0
    allocated = sys.getallocatedblocks
    last = allocated()

    def look(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls, risen, last
        now = allocated()
        if now > last:
            risen += now - last
        last = now
        if event in {"call", "c_call"}:
            calls += 1

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls, risen
