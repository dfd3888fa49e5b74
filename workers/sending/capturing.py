"""What Celery would publish for a call, without publishing it: `send_task` runs to its end with a producer of ours.

So the id, the route, absolute times, compression and what listens to `before_task_publish` (the headers of tracing) are
those of the call. What comes after the publishing, `after_task_publish` and the event `task-sent`, comes when the
process that has committed sends the message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any

from celery import Celery, signals
from kombu.compression import compress
from kombu.entity import maybe_delivery_mode
from kombu.serialization import dumps

from ...strategies.errors import CeleryAlchemyError
from .._celery import LooseConnection, expect_no_result_yet
from ..errors import Unsendable
from .publication import Publication, exchange_name, names_of, refuse_unaccepted, ttl_s


class Captured(BaseException):
    """Ends `send_task` where it would publish; no error."""

    body: Any
    publication: Publication

    def __init__(self, publication: Publication, body: Any) -> None:
        super().__init__()
        self.publication, self.body = publication, body


class CapturingProducer:
    """Stands where a kombu Producer does."""

    connection: LooseConnection = LooseConnection()

    def __init__(self, app: Celery) -> None:
        self._app = app

    def publish(
        self,
        body: Any,
        routing_key: str | None = None,
        delivery_mode: Any = None,
        priority: int = 0,
        serializer: str | None = None,
        headers: dict[str, Any] | None = None,
        compression: str | None = None,
        exchange: Any = None,
        declare: Any = None,
        expiration: float | None = None,
        mandatory: Any = None,
        immediate: Any = None,
        content_type: Any = None,
        content_encoding: Any = None,
        retry: Any = None,
        retry_policy: Any = None,
        timeout: Any = None,
        confirm_timeout: Any = None,
        **properties: Any,
    ) -> None:
        """Raise what would be published; encoded as the Producer would do it.

        Raises:
            Captured: always.
        """
        content_type, content_encoding, data = dumps(body, serializer=serializer)
        headers = {} if headers is None else headers
        if compression:
            data, headers["compression"] = compress(data, compression)
        mode = delivery_mode or getattr(exchange, "delivery_mode", None)
        raise Captured(
            Publication(
                body=data.encode(content_encoding) if isinstance(data, str) else data,
                content_type=content_type,
                content_encoding=content_encoding,
                headers=headers,
                properties={name: value for name, value in properties.items() if value is not None},
                exchange=exchange_name(exchange),
                routing_key=routing_key or "",
                priority=priority or 0,
                delivery_mode=maybe_delivery_mode(mode) if mode else None,
                expires_at=time.time() + expiration if expiration is not None else None,
                queues=names_of(self._app, declare),
            ),
            body,
        )


class Capture:
    """What was captured of one call, and what is to follow when it is published."""

    __slots__ = ("_body", "_context", "name", "publication", "task_id")
    name: str
    publication: Publication
    task_id: str

    def __init__(self, name: str, task_id: str, publication: Publication, body: Any, context: Context) -> None:
        self.name, self.task_id, self.publication = name, task_id, publication
        self._body, self._context = body, context

    def published(self, app: Celery, producer: Any) -> None:
        """Tell who listens that it was published."""
        # In the context of `before_task_publish`: OpenTelemetry ends there what it has begun in it.
        self._context.run(self._tell, app, producer)

    def _tell(self, app: Celery, producer: Any) -> None:
        found = self.publication
        signals.after_task_publish.send(
            sender=self.name, body=self._body, headers=found.headers, exchange=found.exchange,
            routing_key=found.routing_key,
        )  # fmt: skip
        if producer is None or not app.conf.task_send_sent_event:
            return
        headers = found.headers
        sent = {name: headers.get(name) for name in ("root_id", "parent_id", "retries", "eta", "expires")}
        sent |= {"uuid": self.task_id, "name": self.name, "exchange": found.exchange, "routing_key": found.routing_key}
        sent |= {"args": headers.get("argsrepr"), "kwargs": headers.get("kwargsrepr"), "queue": found.routing_key}
        app.events.Dispatcher(enabled=False).publish("task-sent", sent, producer, retry=False)


def capture(
    app: Celery, send: Callable[..., Any], name: str, args: Any, kwargs: Any, options: dict[str, Any]
) -> Capture:
    """Return what `send`, Celery's own `app.send_task`, would publish.

    Raises:
        kombu.exceptions.EncodeError: the arguments cannot be serialised.
        CeleryAlchemyError: the workers of the app would not accept it.
    """
    expect_no_result_yet(app.backend, CapturingProducer)
    # A context of its own: what tracing begins in `before_task_publish` lasts until the message is published.
    context = copy_context()
    try:
        context.run(send, name, args, kwargs, **options, producer=CapturingProducer(app))
    except Captured as captured:
        found = Capture(name, options["task_id"], captured.publication, captured.body, context)
    else:
        raise CeleryAlchemyError(f"{name} was not sent through the producer that it was given, so it has no message.")
    try:
        refuse_unaccepted(app, found.publication)
    except Unsendable as error:
        raise CeleryAlchemyError(
            f"{name} cannot be put into the outbox: {error}. Add it to accept_content, or send at once with "
            f"enqueue_on_commit=False."
        ) from error
    return found


def has_expired(publication: Publication) -> bool:
    """Tell whether it is too late to send it."""
    left_s = ttl_s(publication)
    return left_s is not None and left_s <= 0
