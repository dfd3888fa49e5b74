"""What can go wrong before there is anything to measure."""

from __future__ import annotations


class LoadTestError(Exception):
    """The run cannot go on; the message says why and what to do about it."""


class ServiceError(LoadTestError):
    """A database or broker is missing, did not start, or refuses what a run needs."""


class WorkerError(LoadTestError):
    """A worker did not become ready; the message ends with the tail of its log."""
