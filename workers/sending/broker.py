"""The outbox's own connections to the broker: whatever the app's transport options say, a message counts as sent only
when the broker has confirmed it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from time import monotonic
from typing import Any

from celery import Celery
from kombu import Connection, Producer

from ...strategies.interrupts import is_interrupt
from ..errors import BrokerGone, Unsendable
from .publication import Publication, declared, ttl_s

logger: logging.Logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""A broker that takes longer to answer is stalled."""
IDLE = 4
"""Connections that are kept open for the next message, for each app and process."""


class Broker:
    """A connection to the broker; of one thread or greenlet at a time.

    Raises:
        BrokerGone: it cannot be reached.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._returned: list[BaseException] = []
        self._connection: Connection | None = None
        self.producer: Producer | None = None

    def publish(self, publication: Publication) -> None:
        """Send a message, and wait until the broker has confirmed it.

        Raises:
            BrokerGone: the broker does not answer. It may have the message all the same.
            Exception: it takes others, but not this one.
        """
        # An error may be about the connection: it was idle for too long, or the broker closes it because of what it was
        # sent. A second connection tells.
        for last in (False, True):
            try:
                self._publish(publication)
            except BrokerGone:
                raise
            except Exception as error:
                if is_interrupt(error):
                    self.close()  # in the middle of a message, perhaps
                    raise
                lost = self._is_lost(error)
                if lost or self._is_amqp():
                    self.close()  # the broker closes the channel, or has an answer under way that is not read yet
                if _is_of_broker(error):
                    raise BrokerGone(_described(error)) from error
                if last or not lost:
                    raise
            else:
                return

    def expect_result(self, task_id: str, publication: Publication) -> None:
        """Let the result backend expect the result of a message that is sent now, as `send_task` does: the queue of the
        RPC backend must be there first."""
        if publication.headers.get("ignore_result"):
            return
        producer = self._connected()
        try:
            self._app.backend.on_task_call(producer, task_id)
        except Exception as error:
            if is_interrupt(error):
                raise
            logger.warning("The result backend does not expect the result of %s: %s", task_id, error)

    def _publish(self, publication: Publication) -> None:
        producer = self._connected()
        transport = producer.connection.transport
        left_s = ttl_s(publication)
        self._returned.clear()
        producer.publish(
            publication.body,
            exchange=publication.exchange,
            routing_key=publication.routing_key,
            content_type=publication.content_type,
            content_encoding=publication.content_encoding,
            headers=dict(publication.headers),
            priority=publication.priority,
            delivery_mode=publication.delivery_mode,
            declare=declared(self._app, publication),
            expiration=max(left_s, 0.001) if left_s is not None else None,
            retry=False,
            **({"mandatory": True, "timeout": TIMEOUT_S} if transport.driver_type == "amqp" else {}),
            **publication.properties,
        )
        if self._returned:
            raise Unsendable(f"the broker has no queue for it: {self._returned[0]}")

    def _connected(self) -> Producer:
        """Return the producer, connected now where it was not.

        Raises:
            BrokerGone: the broker cannot be reached.
        """
        if self.producer is None:
            connection = _new_connection(self._app)
            try:
                connection.ensure_connection(
                    max_retries=max(1, len(connection.alt or ())), interval_start=0, interval_step=0, timeout=TIMEOUT_S
                )
                sock = getattr(connection.connection, "sock", None)
                if sock is not None:
                    sock.settimeout(TIMEOUT_S)  # of a queue's declaration too, which has no timeout of its own
                told = self._on_return if connection.transport.driver_type == "amqp" else None
                self.producer = Producer(connection.default_channel, auto_declare=False, on_return=told)
            except Exception as error:
                with contextlib.suppress(Exception):
                    connection.collect()
                if is_interrupt(error):
                    raise
                raise BrokerGone(_described(error)) from error
            self._connection = connection
        return self.producer

    def _on_return(self, error: BaseException, exchange: str, routing_key: str, message: Any) -> None:
        self._returned.append(error)

    def _is_lost(self, error: Exception) -> bool:
        """Tell whether `error` may be about the connection, not the message."""
        return self._connection is not None and isinstance(error, self._connection.connection_errors)

    def _is_amqp(self) -> bool:
        return self._connection is not None and self._connection.transport.driver_type == "amqp"

    def close(self) -> None:
        """Close the connection without asking the broker, which may not answer."""
        connection, self._connection, self.producer = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.collect()


class Breaker:
    """Remembers that the broker was gone, so that not everything that is committed tries it again."""

    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0

    def __init__(self) -> None:
        self._failures = 0
        self._closed_until = 0.0
        self.pause_s: float = 0.0
        """For how long the broker was to be left alone, last time."""

    @property
    def lets_through(self) -> bool:
        """Whether the broker is to be tried."""
        return monotonic() >= self._closed_until

    def failed(self) -> float:
        """The broker is gone; return for how many seconds it is to be left alone."""
        self.pause_s = min(self.first_pause_s * 2.0 ** min(self._failures, 10), self.longest_pause_s)
        self._failures += 1
        self._closed_until = monotonic() + self.pause_s
        return self.pause_s

    def answered(self) -> None:
        """The broker has taken a message."""
        self._failures, self._closed_until = 0, 0.0


class _Brokers:
    """What is known of the broker of an app, and the connections to it that are idle."""

    def __init__(self) -> None:
        self.breaker = Breaker()
        self._pid = os.getpid()
        self._idle: list[Broker] = []
        self._inherited: list[Broker] = []

    def take(self, app: Celery) -> Broker:
        if self._pid != os.getpid():
            # Of the parent. Not closed, and not let go either: that would shut its sockets down.
            self._pid, self._inherited, self._idle = os.getpid(), [*self._inherited, *self._idle], []
        try:
            return self._idle.pop()
        except IndexError:
            return Broker(app)

    def give_back(self, broker: Broker) -> None:
        if broker.producer is not None and len(self._idle) < IDLE:
            self._idle.append(broker)
        else:
            broker.close()

    def close(self) -> None:
        while self._pid == os.getpid() and self._idle:
            self._idle.pop().close()


_brokers: weakref.WeakKeyDictionary[Celery, _Brokers] = weakref.WeakKeyDictionary()


class connected:  # noqa: N801 - used as a function is
    """Lend a Broker of `app` to the block; it connects with the first message."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._all = _brokers.setdefault(app, _Brokers())

    def __enter__(self) -> Broker:
        self._broker = self._all.take(self._app)
        return self._broker

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._broker.close()  # in the middle of a message, perhaps
        self._all.give_back(self._broker)


def breaker_of(app: Celery) -> Breaker:
    """Return what this process remembers of the broker of `app`."""
    return _brokers.setdefault(app, _Brokers()).breaker


def close_idle(app: Celery) -> None:
    """Close the connections that are open for the next message."""
    found = _brokers.get(app)
    if found is not None:
        found.close()


def _new_connection(app: Celery) -> Connection:
    """Return a connection that waits for the broker's answers, but not for ever; not connected yet."""
    connection = app.connection_for_write()
    options = connection.transport_options
    if connection.transport.driver_type == "amqp":
        options["confirm_publish"] = True
    elif connection.transport.driver_type == "redis":
        for name in ("socket_timeout", "socket_connect_timeout"):
            if options.get(name) is None:
                options[name] = TIMEOUT_S
    return connection


def _is_of_broker(error: BaseException) -> bool:
    """Tell whether `error` says that the broker takes nothing at present: it is stalled, or Redis is full, read-only or
    loading."""
    kinds: list[type[BaseException]] = [TimeoutError]
    redis: Any = sys.modules.get("redis")
    if redis is not None:
        names = (
            "TimeoutError",
            "OutOfMemoryError",
            "ReadOnlyError",
            "BusyLoadingError",
            "ClusterError",
            "TryAgainError",
        )
        kinds += [kind for name in names if (kind := getattr(redis.exceptions, name, None)) is not None]
    return isinstance(error, tuple(kinds)) or isinstance(error.__context__, tuple(kinds))


def _described(error: BaseException) -> str:
    return f"the broker does not answer: {type(error).__name__}: {error}"
