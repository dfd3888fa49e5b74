"""What the units of work of this process are doing, put together when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.pool import QueuePool

from .._sqlalchemy import connections_of
from .._sqlalchemy_pools import idle_records
from ..drivers.base import driver_of
from ..engines.held import holding_of
from ..engines.holding import Holding
from ..engines.leaks import describe as describe_origin
from ..engines.pool import queues_of
from ..entry import written
from ..registry import UnitOfWorkRegistry, open_units
from ..scope import Scope, living_scopes
from ..unit_of_work import UnitOfWork
from .statements import Activity, activity_outside

EXECUTING, IDLE, NOTHING = "in a statement", "idle in transaction", "no transaction"


def report(registries: Iterable[UnitOfWorkRegistry]) -> dict[str, Any]:
    """Return what is open now in this process, the oldest first, and what was."""
    now = monotonic()
    registries = list(registries)
    longest = max(registries, key=lambda registry: registry.longest_s, default=None)
    units = [describe(unit, now) for unit in sorted(open_units(), key=lambda unit: unit.began)]
    return {
        "open": [*units, *(one for scope in living_scopes() for one in describe_outside(scope, now))],
        "ended": sum(registry.ended for registry in registries),
        "longest": (
            {"task": written(longest.longest), "s": round(longest.longest_s, 3)}
            if longest and longest.longest
            else None
        ),
        "leaks": sum(registry.leaks for registry in registries),
    }


def describe_longest(registry: UnitOfWorkRegistry) -> dict[str, Any]:
    """Return the report of the longest unit of work so far."""
    return {"task": written(registry.longest), "s": round(registry.longest_s, 3)}


def describe(unit: UnitOfWork, now: float) -> dict[str, Any]:
    """Return the report of one unit of work, ages in seconds.

    What is known of its statements is None until they are watched: they are from the first question on.
    """
    activity: Activity | None = unit.activity
    name, bracket, rest = unit.label.partition("[")
    return {
        "task": name if bracket else unit.label,
        "id": rest.rstrip("]") if bracket else None,
        "age_s": round(now - unit.began, 3),
        "statements": activity.statements if activity is not None else None,
        "state": state_of(unit),
        "since_s": round(now - activity.at, 3) if activity is not None else None,
        "statement": activity.shown() if activity is not None else None,
    }


def describe_outside(scope: Scope, now: float) -> Iterable[dict[str, Any]]:
    """Yield the connections that a thread or greenlet has checked out itself, with no unit of work open: one that a
    task has started and left behind, for example. In the shape of `describe`; how old they are is not known."""
    if scope.units:
        return  # they are part of what that unit of work does
    activity = activity_outside(scope)
    for record in list(scope.held):
        holding = holding_of(record)
        if holding is not None and holding.unit is None:
            yield {
                "task": f"connection checked out at {describe_origin(holding.origin)}",
                "id": None,
                "age_s": None,
                "statements": activity.statements if activity is not None else None,
                "state": _state_outside(holding, activity),
                "since_s": round(now - activity.at, 3) if activity is not None else None,
                "statement": activity.shown() if activity is not None else None,
            }


def _state_outside(holding: Holding, activity: Activity | None) -> str:
    driver, connection = holding.watch.driver, holding.record.dbapi_connection
    try:
        if (activity is not None and activity.executing) or driver.is_executing(connection):
            return EXECUTING
        return NOTHING if connection is None or driver.in_transaction(connection) is False else IDLE
    except Exception:  # its own thread has closed it meanwhile
        return NOTHING


def state_of(unit: UnitOfWork) -> str:
    """Return what `unit` is doing: "in a statement", "idle in transaction" or "no transaction"."""
    if unit.activity is not None and unit.activity.executing:
        return EXECUTING
    connected = [one for one in unit.all_units if one.connected]
    if any(_is_executing(one) for one in connected):
        return EXECUTING
    if any(one.read_only is not True for one in connected) or _has_connected_by_itself(unit):
        return IDLE
    return NOTHING


def _has_connected_by_itself(unit: UnitOfWork) -> bool:
    """Tell whether the code of `unit` holds a connection that is not its Session's."""
    mine = [holding_of(record) for record in list(unit.scope.held) if record not in unit.held]
    return any(holding is not None and holding.unit is None for holding in mine)


def _is_executing(unit: UnitOfWork) -> bool:
    session = unit.opened
    try:
        connections = connections_of(session) if session is not None else []
        return any(
            driver_of(one.dialect).is_executing(one.connection.dbapi_connection)
            for one in connections
            if not one.closed and not one.invalidated
        )
    except Exception:  # its own thread has ended it meanwhile
        return False


def connections(engines: Iterable[Engine]) -> dict[str, int]:
    """Return how many connections `engines` have open, and how many of these are in use."""
    pools = list({id(engine.pool): engine.pool for engine in engines}.values())
    out = sum(max(0, pool.checkedout()) for pool in pools if isinstance(pool, QueuePool))
    idle = [record for pool in pools for queue in queues_of(pool) for record in idle_records(queue)]
    return {"open": out + sum(1 for record in idle if record.dbapi_connection is not None), "checked out": out}
