"""Waiting for a condition with a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

POLL_S = 0.01
T = TypeVar("T")


def eventually(condition: Callable[[], T], what: str, *, within_s: float = 30) -> T:
    """Return the first true value of `condition()`; fail, saying `what` never came true, after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what} (last value: {value!r})")
        time.sleep(POLL_S)
    return value
