"""`alchemy_metrics`: who is told of what happens, in each process of a worker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kombu.utils.imports import symbol_by_name
from sqlalchemy.pool import QueuePool

from ...strategies.watching.activity import activities
from ...strategies.watching.open_telemetry import OpenTelemetryObserver
from .. import apps
from ..errors import ConfigurationError

OPENTELEMETRY = "opentelemetry"
_METHODS = ("unit_ended", "waited", "leaked")


def start(setting: str) -> None:
    """Let this process's units of work be observed as `alchemy_metrics` says.

    Raises:
        ConfigurationError: what it names cannot be imported, or is no observer.
    """
    if setting == OPENTELEMETRY:
        try:
            activities.observer = OpenTelemetryObserver(in_use)
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
    activities.observer = observer


def in_use() -> Iterable[tuple[str, int]]:
    """Return the connections in use in this process, by the name of their database."""
    for db in apps.every():
        strategy = db._strategy
        pools = [engine.pool for engine in strategy.engines_made()] if strategy is not None else []
        yield db.database, sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool))
