"""How many connections a fleet can open, and whether the servers allow them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .findings import Finding, error, note, warning
from .servers import Server

TIGHT = 0.8
"""From this share of the server's connections on, there is a warning: others want some too."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many workers there are."""

    hosts: int = 1
    workers: int = 1
    """On each host."""

    @property
    def total(self) -> int:
        return self.hosts * self.workers


@dataclass(frozen=True, slots=True)
class Demand:
    """The most connections to one database."""

    database: str
    each: int | None
    """Of one process; None: no limit."""
    processes: int
    """Of one worker: prefork's main process is one of them."""
    workers: int

    @property
    def total(self) -> int | None:
        return None if self.each is None else self.each * self.processes * self.workers

    def __str__(self) -> str:
        if self.each is None:
            return "no limit"
        return f"{self.workers} workers x {self.processes} processes x {self.each} connections = {self.total}"


def judge(demands: list[Demand], servers: dict[str, Server]) -> Iterator[Finding]:
    """Compare what the fleet can open with what each server allows; databases on one server add up."""
    by_server: dict[str, list[Demand]] = defaultdict(list)
    for demand in demands:
        server = servers.get(demand.database)
        if demand.each is None:
            yield warning(
                "no-limit",
                f"The connection pool of the database {demand.database!r} sets no limit on connections.",
                "Leave poolclass out of engine_options (or give max_overflow a number), and each worker has a limit.",
                demand.database,
            )
        elif server is not None:
            by_server[server.identity].append(demand)
    for together in by_server.values():
        server = servers[together[0].database]
        yield from _judge(together, server)


def _judge(demands: list[Demand], server: Server) -> Iterator[Finding]:
    wanted = sum(demand.total or 0 for demand in demands)
    names = " and ".join(repr(demand.database) for demand in demands)
    sums = "; ".join(f"{demand.database}: {demand}" for demand in demands)
    allowed, what = server.allowed
    if server.pooler or allowed is None:
        return
    if wanted > allowed:
        yield error(
            "too-many-connections",
            f"The workers can open {wanted} connections to the server of {names}, which allows {allowed} ({what}). "
            f"{sums}.",
            f"Lower pool_size and max_overflow in engine_options or the concurrency, raise {what}, or put PgBouncer "
            f"between and set alchemy_external_pooler = 'pgbouncer'.",
            demands[0].database,
        )
    elif wanted > TIGHT * allowed:
        yield warning(
            "few-connections-left",
            f"The workers can open {wanted} of the {allowed} connections ({what}) of the server of {names}: little is "
            f"left for the web application, migrations and you. {sums}.",
            f"Raise {what}, or put PgBouncer between and set alchemy_external_pooler = 'pgbouncer'.",
            demands[0].database,
        )
    else:
        yield note("connections", f"At most {wanted} of {allowed} ({what}) of the server of {names}. {sums}.", "")
