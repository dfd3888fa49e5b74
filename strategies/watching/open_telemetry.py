"""Metrics through OpenTelemetry's API, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

#: The name of a database, and its connections that are in use.
InUse = Callable[[], Iterable[tuple[str, int]]]
#: What became of messages of the outbox, and of how many, since the process began.
Sent = Callable[[], Iterable[tuple[str, int]]]


class OpenTelemetryObserver:
    """Records what happens in this process with the global MeterProvider.

    Args:
        in_use: Returns the connections in use, by database; asked when metrics are collected.
        sent: Returns what this process has done with messages of the outbox; asked likewise.
    Raises:
        ImportError: opentelemetry-api is not installed.
    """

    def __init__(self, in_use: InUse, sent: Sent = lambda: ()) -> None:
        from opentelemetry import metrics

        meter: Any = metrics.get_meter("celery_alchemy")
        self._duration = meter.create_histogram(
            "celery_alchemy.unit_of_work.duration",
            unit="s",
            description="From the beginning of a unit of work to its end",
        )
        self._statements = meter.create_histogram(
            "celery_alchemy.unit_of_work.statements", unit="{statement}", description="Statements of a unit of work"
        )
        self._wait = meter.create_histogram(
            "celery_alchemy.checkout.wait", unit="s", description="Until a connection was checked out, or refused"
        )
        self._leaks = meter.create_counter(
            "celery_alchemy.leaks", unit="{connection}", description="Connections taken back from tasks that kept them"
        )

        def observe(options: object) -> Iterable[Any]:
            return [metrics.Observation(count, {"database": database}) for database, count in in_use()]

        meter.create_observable_gauge(
            "celery_alchemy.connections.in_use", callbacks=[observe], unit="{connection}",
            description="Connections that are checked out",
        )  # fmt: skip

        def observe_sent(options: object) -> Iterable[Any]:
            return [metrics.Observation(count, {"outcome": outcome}) for outcome, count in sent()]

        meter.create_observable_counter(
            "celery_alchemy.outbox.messages", callbacks=[observe_sent], unit="{message}",
            description="Messages of the outbox that this process has sent, failed to send, found expired, set aside",
        )  # fmt: skip
        self._outbox: dict[str, float] = {}
        for name, unit, what in (
            ("waiting", "{message}", "Messages that wait in the outbox"),
            ("set_aside", "{message}", "Messages that are set aside after too many failures"),
            ("oldest", "s", "Age of the oldest message that waits in the outbox"),
        ):
            meter.create_observable_gauge(
                f"celery_alchemy.outbox.{name}", callbacks=[self._observe_outbox(name)], unit=unit, description=what
            )

    def _observe_outbox(self, name: str) -> Callable[[object], Iterable[Any]]:
        from opentelemetry import metrics

        return lambda options: [metrics.Observation(self._outbox[name])] if name in self._outbox else []

    def outbox(self, waiting: int, set_aside: int, oldest_s: float) -> None:
        """Note what is in the outbox, for when metrics are collected."""
        self._outbox.update(waiting=waiting, set_aside=set_aside, oldest=oldest_s)

    def unit_ended(self, unit: Any, duration_s: float) -> None:
        """Record its duration and its statements."""
        attributes = {"task": unit.label.partition("[")[0], "outcome": unit.outcome}
        self._duration.record(duration_s, attributes)
        if unit.activity is not None:
            self._statements.record(unit.activity.statements, attributes)

    def waited(self, database: str, wait_s: float) -> None:
        """Record a checkout."""
        self._wait.record(wait_s, {"database": database})

    def leaked(self, count: int) -> None:
        """Count connections that were taken back."""
        self._leaks.add(count)
