"""A message as it is published: what Celery would hand to the broker, kept as bytes, and as JSON in the outbox.

Nothing in it is run or decoded when it is sent: it names no class, no callable and no serializer.
"""

from __future__ import annotations

import base64
import inspect
import json
import math
import time
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from celery import Celery
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Exchange, Producer, Queue
from kombu.serialization import prepare_accept_content

from ...strategies.errors import CeleryAlchemyError
from ...strategies.features.outbox_table import LONGEST
from ...strategies.names import type_of
from ..errors import Unsendable

#: Keyword arguments of `publish`: no property of a message may be called so.
_RESERVED = frozenset(inspect.signature(Producer.publish).parameters)
_PLAIN = (str, int, float, bool, type(None))
_TAG = "__celery_alchemy__"
#: What AMQP's headers may be and JSON has no word for: how it is read again.
_READ: dict[str, Any] = {
    "bytes": base64.b64decode,
    "datetime": datetime.fromisoformat,
    "decimal": Decimal,
    "uuid": UUID,
}


@dataclass(slots=True)
class Publication:
    """What is published."""

    body: bytes
    content_type: str
    content_encoding: str
    headers: dict[str, Any]
    properties: dict[str, Any] = field(default_factory=dict)
    exchange: str = ""
    routing_key: str = ""
    priority: int = 0
    delivery_mode: int | None = None
    expires_at: float | None = None
    """Seconds since 1970; not sent any more after that, and the broker drops it then."""
    queues: list[Any] = field(default_factory=list)
    """What must be declared before: names of queues, or the declarations themselves."""

    def to_text(self, name: str) -> str:
        """Return it as a row of the outbox keeps it.

        Raises:
            CeleryAlchemyError: it cannot be written down; the message names the task `name`.
        """
        parts = {
            "body": base64.b64encode(self.body).decode(),
            "content_type": self.content_type,
            "content_encoding": self.content_encoding,
            "headers": self.headers,
            "properties": self.properties,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "priority": self.priority,
            "delivery_mode": self.delivery_mode,
            # Not those that the call alone has described: another sender would declare them otherwise.
            "queues": [queue for queue in self.queues if isinstance(queue, str)],
        }
        try:
            text = json.dumps(parts, default=_write, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CeleryAlchemyError(
                f"{name} cannot be put into the outbox, for an option of this call cannot be written as JSON: {error}. "
                f"Headers: {', '.join(map(str, self.headers))}; others: {', '.join(map(str, self.properties))}. Leave "
                f"it out, or send at once with enqueue_on_commit=False."
            ) from error
        if len(text) > LONGEST:
            raise CeleryAlchemyError(
                f"{name} cannot be put into the outbox: the message has {len(text):,} bytes, and the longest may have "
                f"{LONGEST:,}. Send the key of what it is about, not the thing itself."
            )
        return text


def from_text(text: str, expires_at: float | None) -> Publication:
    """Return what `to_text` has written down, whoever has written it.

    Raises:
        Unsendable: it is none.
    """
    if not text:
        raise Unsendable(f"the message is empty, or longer than {LONGEST:,}")
    try:
        parts = json.loads(text, object_hook=_read, parse_constant=_refuse_constant)
        found = Publication(**parts)
        found.body = base64.b64decode(found.body, validate=True)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise Unsendable(f"the message is no message of the outbox: {type(error).__name__}: {error}") from error
    found.expires_at = expires_at
    _check(found)
    return found


def _check(found: Publication) -> None:
    texts = (found.content_type, found.content_encoding, found.exchange, found.routing_key)
    if not all(isinstance(text, str) and len(text) <= 255 for text in texts):
        raise Unsendable("content_type, content_encoding, exchange and routing_key must be strings of up to 255")
    for what, words in (("headers", found.headers), ("properties", found.properties)):
        if not isinstance(words, dict):
            raise Unsendable(f"{what} is {type_of(words)}, but it must be a dict")
    wrong = _RESERVED & found.properties.keys()
    if wrong:
        raise Unsendable(f"properties has {sorted(wrong)[0]!r}, which is no property of a message")
    if not all(isinstance(value, _PLAIN) for value in found.properties.values()):
        raise Unsendable("properties must be strings and numbers")
    if type(found.priority) is not int or not 0 <= found.priority <= 255:
        raise Unsendable(f"priority must be a number from 0 to 255, not {found.priority!r:.40}")
    if found.delivery_mode not in {None, 1, 2}:
        raise Unsendable(f"delivery_mode must be 1 or 2, not {found.delivery_mode!r:.40}")
    if not isinstance(found.queues, list) or not all(isinstance(one, str) for one in found.queues):
        raise Unsendable("queues must be a list of names")
    if found.expires_at is not None and not math.isfinite(found.expires_at):
        raise Unsendable("expires_at is no moment")


def ttl_s(publication: Publication) -> float | None:
    """Return for how long it may wait at the broker, 0 or less where it has expired; None: for ever."""
    return None if publication.expires_at is None else publication.expires_at - time.time()


def waits_s(app: Celery, publication: Publication) -> float:
    """Return for how many seconds from now a worker that has it lets it wait, for its ETA."""
    try:
        eta = maybe_iso8601(publication.headers.get("eta"))
        return max(0.0, maybe_make_aware(eta, app.timezone).timestamp() - time.time()) if eta is not None else 0.0
    except (TypeError, ValueError, OverflowError):
        return 0.0  # whoever can write to the table may have written that; the worker refuses it


def refuse_unaccepted(app: Celery, publication: Publication) -> None:
    """Refuse what the workers of `app` would refuse.

    Raises:
        Unsendable: `accept_content` does not have its content type.
    """
    accepted = prepare_accept_content(app.conf.accept_content)
    if accepted is not None and publication.content_type not in accepted:
        raise Unsendable(
            f"its content type is {publication.content_type!r:.100}, and accept_content is "
            f"{sorted(app.conf.accept_content)}: the app's workers would refuse it"
        )


def declared(app: Celery, publication: Publication) -> list[Queue]:
    """Return the queues to declare before it is published. Of a row's only the name counts: how it is declared, the
    app says."""
    known = app.amqp.queues
    found = []
    for queue in publication.queues:
        if not isinstance(queue, str):
            found.append(queue)
        elif queue in known:
            found.append(known[queue])
        elif known.create_missing:
            found.append(known.new_missing(queue))  # and not `known[queue]`: workers consume from what is known
    return found


def names_of(app: Celery, entities: Any) -> list[Any]:
    """Return the entities to declare, as a Publication keeps them: those that the app knows by their names."""
    known = app.amqp.queues
    return [
        entity.name if isinstance(entity, Queue) and entity.name in known and known[entity.name] == entity else entity
        for entity in entities or ()
    ]


def exchange_name(exchange: Any) -> str:
    """Return the name of an exchange that was given as an object, or by its name."""
    return exchange.name if isinstance(exchange, Exchange) else exchange or ""


def _write(value: Any) -> Any:
    if isinstance(value, bytes):
        return {_TAG: ["bytes", base64.b64encode(value).decode()]}
    for kind, name in ((datetime, "datetime"), (Decimal, "decimal"), (UUID, "uuid")):
        if isinstance(value, kind):
            return {_TAG: [name, value.isoformat() if isinstance(value, datetime) else str(value)]}
    raise TypeError(f"{type(value).__name__} is none of JSON's types")


def _read(found: dict[str, Any]) -> Any:
    tagged = found.get(_TAG)
    if isinstance(tagged, list) and len(tagged) == 2 and tagged[0] in _READ and isinstance(tagged[1], str):
        return _READ[tagged[0]](tagged[1])
    return found


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
