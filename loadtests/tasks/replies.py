"""The way back from a task to the load generator: one short Redis list, no result backend.

`AsyncResult.get()` would measure the result backend instead: with a thread-local backend every greenlet opens a Redis
connection of its own (gevent 215 tasks/s against 508 without results), and each result wakes every waiting greenlet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis

EXPIRE_S = 3600  # Lists that are read no more, because the load generator was killed, disappear after this time


class Outcome(StrEnum):
    """How one attempt of a task ended; only RETRY is not final."""

    SUCCESS = "success"
    FAILURE = "failure"
    RETRY = "retry"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker tells about one ended attempt of a task."""

    task_id: str
    outcome: Outcome
    started: float  # `time.monotonic()` on the worker: comparable with the load generator's on the same host only
    ended: float
    pid: int  # The pool process
    checked_out: int | None = None
    """Connections checked out of that process's connection pool right after the attempt; None if it does not count."""
    error_type: str | None = None
    error: str | None = None
    checkout_ms: float = 0.0  # Waiting for a connection of the connection pool, connecting included
    database_ms: float = 0.0  # In the driver: statements, COMMIT and ROLLBACK
    breach: str = ""  # What was wrong with the Session this attempt was given; empty if nothing was
    attempt: int = 1  # Which attempt it was, from 1: the reply to a retried one can come after the reply to the last

    def to_json(self) -> str:
        """Encode for the reply list."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str) -> Reply:
        """Decode what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "outcome": Outcome(fields["outcome"])})


def redis_url(broker_url: str) -> str | None:
    """Return the redis-py URL of the server behind a kombu URL; None if that is neither Redis nor Valkey."""
    parts = urlsplit(broker_url)
    if parts.scheme == "redis+socket":
        virtual_host = parse_qs(parts.query).get("virtual_host", ["0"])[0]
        return f"unix://{parts.path}?db={virtual_host.strip('/') or 0}"
    return broker_url if parts.scheme in {"redis", "rediss"} else None


class ReplyList:
    """A list of small JSON messages, pushed to by tasks and popped by one reader.

    Safe in every worker pool: the client connects lazily, notices a fork, and gives each thread or greenlet a
    connection of its own.
    """

    def __init__(self, url: str, key: str) -> None:
        self._client: Any = redis.Redis.from_url(url)
        self._key = key

    def push(self, message: str, key: str | None = None) -> None:
        """Append one message; to another list of the same server if `key` names it."""
        key = key or self._key
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.rpush(key, message).expire(key, EXPIRE_S).execute()

    def pop(self, timeout_s: float, key: str | None = None) -> Iterator[bytes]:
        """Wait up to `timeout_s` for a message, then yield all there are, up to 500; `key` is as in `push`."""
        first = self._client.blpop([key or self._key], timeout=timeout_s)
        if first is not None:
            yield first[1]
            yield from self._client.lpop(key or self._key, 500) or ()

    def length_of(self, key: str) -> int:
        """Return how long another list of the same server is."""
        return int(self._client.llen(key))

    def delete(self) -> None:
        """Delete the list with what is in it."""
        self._client.delete(self._key)

    def close(self) -> None:
        """Close the connections of this process."""
        self._client.close()
