"""The database server and the broker of a run: what the user gives, or servers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .brokers import Broker, connect_broker, embedded_valkey
from .databases import DatabaseServer, connect_server, parse_database_url
from .postgresql import embedded_postgresql
from .replies import redis_url
from .rundir import RunDirectory


@contextmanager
def database_server(run: RunDirectory, database_url: str | None = None) -> Iterator[DatabaseServer]:
    """Yield the server behind `database_url`, or an embedded PostgreSQL that stops when the block ends.

    Raises:
        ServiceError: It cannot be reached or does not start.
    """
    with ExitStack() as stack:
        if database_url:
            yield connect_server(parse_database_url(database_url), "DATABASE_URL")
        else:
            yield connect_server(stack.enter_context(embedded_postgresql(run)), "embedded: Unix socket, fsync off")


@contextmanager
def broker(run: RunDirectory, broker_url: str | None = None) -> Iterator[Broker]:
    """Yield the broker behind `broker_url`, or an embedded Valkey that stops when the block ends.

    A broker that is neither Redis nor Valkey gets an embedded Valkey beside it, for the replies.

    Raises:
        ServiceError: It cannot be reached or does not start.
    """
    with ExitStack() as stack:
        if broker_url:
            transport = connect_broker(broker_url)
            reply_url = redis_url(broker_url)
            label = f"{transport} (BROKER_URL)"
            if reply_url is None:
                reply_url = redis_url(stack.enter_context(embedded_valkey(run)))
                label += " with Valkey (embedded) for the replies"
            assert reply_url is not None
            yield Broker(broker_url, reply_url, label)
        else:
            url = stack.enter_context(embedded_valkey(run))
            reply_url = redis_url(url)
            assert reply_url is not None
            yield Broker(url, reply_url, "Valkey (embedded)")
