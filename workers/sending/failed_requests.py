"""Web requests that have failed: that the Session of one ends without a COMMIT is no news.

Flask answers an exception, or `abort()`, before it removes the Session: by then nothing tells of the exception any
more. Its signal of a finished request does, by the status of the response.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

from ...strategies.features.foreign_callbacks import waiting_here

FAILS_FROM = 400
"""The lowest status of a response that says so."""


def watch() -> None:
    """Watch the requests of Flask, where a program uses it."""
    flask = sys.modules.get("flask")
    if flask is not None:
        _watch_flask(flask)


@functools.cache
def _watch_flask(flask: Any) -> None:
    with contextlib.suppress(AttributeError, RuntimeError):  # imported only in part; Flask before 2.3 without blinker
        flask.request_finished.connect(_finished, weak=False)


def _finished(sender: object, response: Any, **_: object) -> None:
    if response.status_code >= FAILS_FROM:
        for waiting in waiting_here():
            waiting.request_failed = True
