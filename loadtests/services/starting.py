"""The database server and the broker of a run: what the user gives, or servers of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from ..tasks.replies import redis_url
from .brokers import Broker, connect_broker
from .databases import DatabaseServer, connect_server, parse_database_url
from .proxy import distant
from .rundir import RunDirectory
from .servers import MariaDBServer, PostgreSQLServer, ValkeyServer

FAST, DURABLE, MARIADB = "fast", "durable", "mariadb"
PROFILE = re.compile(rf"({FAST}|{DURABLE}|{MARIADB})(?:\+(\d+(?:\.\d+)?)ms)?")
"""Servers of the run's own. With a delay, the workload reaches them over TCP, and each round trip takes longer."""


@contextmanager
def database_server(run: RunDirectory, database_url: str | None = None) -> Iterator[DatabaseServer]:
    """Yield the server behind `database_url`, or one of our own, which stops when the block ends.

    Args:
        database_url: A URL, or the name of a profile: "fast" (PostgreSQL on a Unix socket, fsync off; the default),
            "durable" (PostgreSQL with fsync), "mariadb"; with a delay like "durable+0.25ms".
    Raises:
        ServiceError: It cannot be reached or does not start.
    """
    profile = PROFILE.fullmatch(database_url or FAST)
    if profile is None:
        yield connect_server(parse_database_url(str(database_url)), "DATABASE_URL")
        return
    name, delay_ms = profile.groups()
    with ExitStack() as stack:
        own: Any = MariaDBServer(run) if name == MARIADB else PostgreSQLServer(run, durable=name == DURABLE)
        url, origin = stack.enter_context(own).url, "our own" if name == MARIADB else "embedded"
        durability = f"fsync {'off' if name == FAST else 'on'}"
        if delay_ms is None:
            yield connect_server(url, f"{origin}: Unix socket, {durability}")
        else:
            server = connect_server(url, f"{origin}: TCP with {delay_ms} ms added, {durability}")
            yield replace(server, through=stack.enter_context(distant(url, float(delay_ms) / 1000)))


@contextmanager
def broker(run: RunDirectory, broker_url: str | None = None) -> Iterator[Broker]:
    """Yield the broker behind `broker_url`, or an embedded Valkey that stops when the block ends.

    A broker that is neither Redis nor Valkey gets an embedded Valkey beside it, for the replies.

    Raises:
        ServiceError: It cannot be reached or does not start.
    """
    with ExitStack() as stack:
        label = f"{connect_broker(broker_url)} (BROKER_URL)" if broker_url else "Valkey (embedded)"
        url = broker_url or stack.enter_context(ValkeyServer(run)).url
        reply_url = redis_url(url)
        if reply_url is None:
            reply_url = redis_url(stack.enter_context(ValkeyServer(run)).url)
            label += " with Valkey (embedded) for the replies"
        assert reply_url is not None
        yield Broker(url, reply_url, label)
