"""psycopg 3: a connection that counts the transactions it begins.

Tried with psycopg 3.3.9. What is private is `Connection._get_tx_start_command`, which the driver asks for each BEGIN. A
version that names it otherwise counts nothing: then a transaction that code has ended is not told from its successor.
The adapters of a connection (`Connection._adapters`) are changed in place: only a count tells the old from the new.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import psycopg
from psycopg.adapt import AdaptersMap

from ..scope import here
from .texts import counting

_IDLE = psycopg.pq.TransactionStatus.IDLE


class FollowedConnection(psycopg.Connection[Any]):
    """A connection of psycopg's that counts."""

    celery_alchemy_begins: int = 0
    """How often a transaction has begun since SQLAlchemy has ended its last one."""

    _get_tx_start_command = counting(getattr(psycopg.Connection, "_get_tx_start_command", bytes))

    @contextlib.contextmanager
    def transaction(self, *args: Any, **kwargs: Any) -> Iterator[psycopg.Transaction]:
        """Do what the driver's own does. Where it has begun the transaction, it is right to end it."""
        begins = self.pgconn.transaction_status == _IDLE
        try:
            with super().transaction(*args, **kwargs) as transaction:
                yield transaction
        finally:
            if begins:
                self.celery_alchemy_begins -= 1
        if begins:
            here().ends += 1


class FollowedAdapters(AdaptersMap):
    """The adapters of a connection, which count what is registered with it."""

    celery_alchemy_registered: int
    """How much was."""

    def __init__(self, template: AdaptersMap) -> None:
        super().__init__(template)
        self.celery_alchemy_registered = 0

    def register_dumper(self, cls: Any, dumper: Any) -> None:
        self.celery_alchemy_registered += 1
        super().register_dumper(cls, dumper)

    def register_loader(self, oid: Any, loader: Any) -> None:
        self.celery_alchemy_registered += 1
        super().register_loader(oid, loader)


def follow(connection: psycopg.Connection[Any]) -> None:
    """Let `connection` count the transactions that it begins, and the adapters that are registered with it."""
    if not isinstance(connection, FollowedConnection):
        connection.__class__ = _followed(type(connection))  # type: ignore[arg-type]
    if not isinstance(connection.adapters, FollowedAdapters):
        # Made as one of ours: an object whose class is changed costs each statement more.
        connection._adapters = FollowedAdapters(connection.adapters)


@cache
def _followed(kind: type[psycopg.Connection[Any]]) -> type[FollowedConnection]:
    if kind is psycopg.Connection:
        return FollowedConnection
    return type(kind.__name__, (FollowedConnection, kind), {"__module__": kind.__module__})
