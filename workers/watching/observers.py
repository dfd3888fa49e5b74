"""`alchemy_metrics`: who is told of what happens, in each process of a worker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from kombu.utils.imports import symbol_by_name
from sqlalchemy.engine import Engine
from sqlalchemy.pool import QueuePool

from ...strategies.engines.factory import EngineHook
from ...strategies.engines.pool import MeteredQueuePool
from ...strategies.hooks import UnitHook
from ...strategies.options import DatabaseOptions
from ...strategies.watching.observer import Observer, ObserverHook, harmless
from ...strategies.watching.open_telemetry import OpenTelemetryObserver
from ...strategies.watching.statements import watch_statements, watch_where_wanted
from .. import apps
from ..errors import ConfigurationError
from ..sending.sender import tally
from ..settings import Settings

OPENTELEMETRY = "opentelemetry"
_METHODS = ("unit_ended", "waited", "leaked")
#: Of this process, kept in the child of a fork; empty where there are no metrics.
_observers: list[Observer] = []


def current() -> Observer | None:
    """Return who is told of what happens in this process; None where there are no metrics."""
    return _observers[0] if _observers else None


def use(observer: Observer | None) -> None:
    """Tell `observer` from the next start on; None: no longer."""
    _observers[:] = [observer] if observer is not None else []


def hooks() -> tuple[UnitHook, ...]:
    """Return what follows every unit of work of this process."""
    return tuple(ObserverHook(observer) for observer in _observers)


def engine_hooks(settings: Settings) -> tuple[EngineHook, ...]:
    """Return what the settings want to know of each Engine."""
    wanted = settings.metrics is not None or settings.warn_idle_s is not None or bool(_observers)
    return (watch_statements if wanted else watch_where_wanted,)


def meter_pool(engine: Engine, options: DatabaseOptions) -> None:
    """EngineHook: the observer is told how long each checkout takes."""

    def waited(wait_s: float) -> None:
        observer = current()
        if observer is not None:
            with harmless():
                observer.waited(options.database, wait_s)

    if isinstance(engine.pool, MeteredQueuePool):
        engine.pool.waited = waited


def start(setting: str) -> None:
    """Let this process's units of work be observed as `alchemy_metrics` says.

    Raises:
        ConfigurationError: what it names cannot be imported, or is no observer.
    """
    if setting == OPENTELEMETRY:
        try:
            use(OpenTelemetryObserver(in_use, sent))
        except ImportError as error:
            raise ConfigurationError(
                "alchemy_metrics is 'opentelemetry', but opentelemetry-api is not installed: "
                "pip install opentelemetry-api, and an SDK to collect them."
            ) from error
        return
    try:
        observer: Any = symbol_by_name(setting)
        observer = observer() if isinstance(observer, type) else observer
    except Exception as error:
        raise ConfigurationError(
            f"alchemy_metrics is {setting!r}, which cannot be imported: {type(error).__name__}: {error}. It must be "
            f"'opentelemetry' or 'package.module:observer'."
        ) from error
    missing = [name for name in _METHODS if not callable(getattr(observer, name, None))]
    if missing:
        raise ConfigurationError(f"alchemy_metrics is {setting!r}, but that has no method {', '.join(missing)}.")
    use(observer)


def sent() -> Iterable[tuple[str, int]]:
    """Return what this process has done with messages of the outbox, since it began."""
    return asdict(tally).items()


def in_use() -> Iterable[tuple[str, int]]:
    """Return the connections in use in this process, by the name of their database."""
    for db in apps.every():
        strategy = db._strategy
        pools = [engine.pool for engine in strategy.engines_made()] if strategy is not None else []
        yield db.database, sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool))
